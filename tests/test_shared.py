"""The three shared cells: device and precision, each rung of the data ladder, what is kept and what is resumed."""

import json
import math
import os
import pickle
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FILES, REBUILT, UNREACHABLE, code_cells, idx_files, load_module, publish

# Device and precision


MACHINES = {  # accelerator, whether CUDA has bf16 units, the processor's flags, PRECISION: is bf16 used?
    ("cuda", True, "", "auto"): True,
    ("cuda", False, "avx512_bf16", "auto"): False,
    ("mps", False, "asimd bf16", "auto"): False,
    ("cpu", False, "avx512_bf16", "auto"): True,
    ("cpu", False, "asimd bf16", "auto"): True,
    ("cpu", False, "avx512f", "auto"): False,
    ("cpu", False, "avx512f", "bf16"): True,
    ("cpu", False, "avx512_bf16", "fp32"): False,
}


@pytest.mark.parametrize("machine", MACHINES)
def test_bf16_is_used_where_the_device_has_the_units_or_it_is_told_to(monkeypatch, machine):
    device, units, flags, precision = machine
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device != "cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: units or including_emulation)
    read = Path.read_text
    cpuinfo = f"flags : {flags}\n"
    monkeypatch.setattr(Path, "read_text", lambda p, **how: cpuinfo if p.name == "cpuinfo" else read(p, **how))
    found = {"SEED": 0, "PRECISION": precision, "os": os}
    exec(code_cells(REBUILT[0], "shared")[0].source, found)
    assert (found["DEVICE"].type, found["BF16"]) == (device, MACHINES[machine])


# Data


@pytest.fixture
def nb(tmp_path):
    """Shared and other definitions with an empty data folder."""
    yield load_module(REBUILT[0], OUT=str(tmp_path / "out"), DATA=str(tmp_path / "data"))
    socket.setdefaulttimeout(None)


def test_local_files_come_first(nb, offline, capsys):
    files = idx_files(60, 20)
    publish(nb, "MNIST", files)
    data = nb.load_data("MNIST")
    assert (data.split, data.label, data.banner, data.out) == ("default", "", "", Path(nb.OUT))
    assert (data.x_train.shape, data.x_train.dtype, data.y_train.dtype) == ((60, 28, 28), torch.uint8, torch.int64)
    assert data.x_test.cpu().numpy().tobytes() == files[FILES[1]][16:]
    assert data.y_test.tolist() == list(files[FILES[3]][8:])
    assert data.blobs == dict(zip([f"MNIST/{file}" for file in FILES], nb.PUBLISHED["MNIST"][1:]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("fault", ["truncated", "altered", "empty"])
def test_bad_local_file_is_named_and_refused(nb, fault):
    raw = publish(nb, "MNIST", idx_files(60, 20))
    content = (raw / FILES[0]).read_bytes()
    bad = {"truncated": content[:-100], "altered": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}
    (raw / FILES[0]).write_bytes(bad[fault])
    with pytest.raises(ValueError, match=rf"MNIST/raw/{FILES[0]} is truncated or altered: delete it"):
        nb.load_data("MNIST")


def test_torchvision_comes_second(nb, monkeypatch):
    files = idx_files(60, 20)
    raw = publish(nb, "MNIST", files, there=[])
    monkeypatch.setattr(nb, "fetch_openml", None)  # which is not asked
    monkeypatch.setattr(nb.datasets.MNIST, "download", lambda self: publish(nb, "MNIST", files))
    assert len(nb.load_data("MNIST").x_train) == 60
    assert sorted(path.name for path in raw.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("order", ["right", "wrong"])
def test_openml_comes_third_and_its_order_is_checked(nb, offline, monkeypatch, order):
    files, asked = idx_files(60000, 10000), []
    raw = publish(nb, "KMNIST", files, there=[])
    train_x, test_x, train_y, test_y = (files[file][16 if "images" in file else 8 :] for file in FILES)
    parts = (train_x + test_x, train_y + test_y) if order == "right" else (test_x + train_x, test_y + train_y)
    x, y = (np.frombuffer(part, np.uint8) for part in parts)
    answer = x.reshape(-1, 784), y.astype(str)  # as OpenML has them
    monkeypatch.setattr(nb, "fetch_openml", lambda name, version, **_: asked.append((name, version)) or answer)
    if order == "wrong":
        with pytest.raises(ValueError, match="is truncated or altered: delete it"):
            nb.load_data("KMNIST")
        return
    data = nb.load_data("KMNIST")
    assert asked == [("Kuzushiji-MNIST", 1)]
    assert (data.split, len(data.x_train), len(data.x_test)) == ("default", 60000, 10000)
    assert all((raw / file).read_bytes() == files[file] for file in FILES)


def test_a_host_that_never_answers_is_given_up(nb, monkeypatch, capsys):
    def silent(*args, **options):
        raise TimeoutError(f"timed out after {socket.getdefaulttimeout():.0f} s")

    monkeypatch.setattr(nb.datasets.FashionMNIST, "download", silent)
    monkeypatch.setattr(nb, "fetch_openml", silent)
    assert nb.load_data("FashionMNIST").split == "demo"
    said = capsys.readouterr().out
    for source in "torchvision's mirrors", "OpenML":
        assert f"trying {source}\nfailed: TimeoutError: timed out after {nb.CONNECT_TIMEOUT} s" in said


def test_no_network_at_all_gives_the_labelled_demo(nb, offline, capsys, recwarn):
    """The real torchvision and scikit-learn are called, and both fail for want of a network, in a line each."""
    data = nb.load_data("FashionMNIST")
    said = capsys.readouterr().out.splitlines()
    assert [line.startswith("failed: ") for line in said] == [False, True, False, True]
    assert UNREACHABLE in said[3]
    assert (data.split, len(data.x_train), len(data.x_test), data.blobs) == ("demo", 1500, 297, {})
    assert (data.x_train.shape[1:], data.y_train.dtype) == ((28, 28), torch.int64)
    assert (data.x_train.min(), data.x_train.max()) == (0, 255)
    assert data.label.startswith("DEMO")
    assert "DEMO" in data.banner
    assert data.out == Path(nb.OUT, "demo")
    assert not [w for w in recwarn if "network" in str(w.message)]


def test_demo_writes_under_runs_even_when_out_is_the_repository(nb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nb.DATA, nb.OUT = "demo", "."
    assert nb.load_data("MNIST").out == Path("runs/demo")
    assert [str(path) for path in Path().iterdir()] == ["runs"]


def test_training_files_alone_may_be_missing_if_asked(nb, offline):
    publish(nb, "KMNIST", idx_files(60, 20), there=FILES[1::2])
    data = nb.load_data("KMNIST", enough=FILES[1::2])
    assert (data.split, data.x_train, data.y_train, len(data.x_test)) == ("default", None, None, 20)
    assert {*data.blobs} == {f"KMNIST/{file}" for file in FILES[1::2]}
    assert nb.load_data("KMNIST").split == "demo"


def test_the_real_files_are_the_published_ones(nb, real_data):
    nb.DATA = real_data
    assert [len(nb.read_files(name)) for name in ("MNIST", "FashionMNIST")] == [4, 4]


# Keeping


@pytest.fixture
def kept(tmp_path):
    """The definitions with the demo in place, so that there is something to keep."""
    return load_module(REBUILT[0], data=True, DATA="demo", OUT=str(tmp_path), SAVED=str(tmp_path / "demo"))


def train(nb, name="toy", stop=None, seed=0, length=3, **arguments):
    """A training of random numbers: its weights and history, and after how many epochs it went on.

    Left within the epoch `stop`, so that the one before is the last that was kept.
    """
    model, history, done = torch.nn.Linear(2, 2), [], []
    torch.nn.init.ones_(model.weight)
    for epoch in nb.epochs(name, {"model": model}, history, seed, length, **arguments):
        done.append(epoch)
        model.weight.data += torch.randn(2, 2)
        history.append({"epoch": epoch, "weight": model.weight.sum().item()})
        if epoch == stop:
            break
    return model.weight.detach(), history, done[0] - 1


def test_a_stopped_run_ends_with_the_numbers_of_an_uninterrupted_one(kept, capsys):
    weight, history, _ = train(kept, "other")
    train(kept, stop=3)
    torch.manual_seed(5)  # another process
    resumed, again, after = train(kept)
    assert f"toy: goes on after epoch {after}, from" in capsys.readouterr().out
    assert (again, after) == (history, 2)
    assert torch.equal(resumed, weight)
    assert train(kept, "other", seed=1)[1] != history


@pytest.mark.parametrize("notebook", REBUILT)
def test_nothing_is_resumed_after_a_change_of_any_parameter_argument_or_of_the_data(notebook, tmp_path):
    nb = load_module(notebook, data=True, DATA="demo", OUT=str(tmp_path))
    (cell,) = code_cells(notebook, "parameters")
    assert sorted(nb.PARAMETERS) == sorted(re.findall(r"^([A-Z_\d]+) = ", cell.source, re.MULTILINE))
    for name in {*nb.PARAMETERS} - {"OUT", "NAME"}:  # these two name the folder of the state
        train(nb, stop=3)
        assert train(nb, stop=3)[2] == 2, "it is resumed as long as nothing changes"
        value = getattr(nb, name)
        longer = {tuple: (1,), str: "!"}.get(type(value), 1)
        setattr(nb, name, value + longer)
        assert train(nb, stop=3)[2] == 0, name
    for change in {"seed": 1}, {"length": 4}, {"option": 1}:
        train(nb, stop=3)
        assert train(nb, **change)[2] == 0, change
    train(nb, stop=3)
    nb.data.blobs = {"MNIST/train": "another"}
    assert train(nb, stop=3)[2] == 0
    nb.BF16 = not nb.BF16
    assert train(nb)[2] == 0


def test_numbers_that_are_not_finite_stop_the_run_and_what_was_before_is_kept(kept):
    history = []
    with pytest.raises(FloatingPointError, match=r"toy broke down in epoch 2\. Try another SEED"):  # noqa: PT012
        for epoch in kept.epochs("toy", {}, history, seed=0, length=3):
            history.append({"loss": math.nan if epoch == 2 else 1.0})
    state = torch.load(kept.data.out / "state" / kept.NAME / "toy.pt", weights_only=True)
    assert state["history"] == [{"loss": 1.0}]


def test_a_disk_that_is_full_leaves_the_last_state(kept, monkeypatch):
    train(kept, stop=3)

    def full(state, path):
        Path(path).write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(kept)
    monkeypatch.undo()
    assert train(kept)[2] == 2


def train_linear(nb):
    """train_or_load of a linear model whose training makes its weights ones."""

    def to_ones(model):
        torch.nn.init.ones_(model.weight)
        return [{"loss": 2.0}, {"loss": 1.0}]

    return nb.train_or_load("toy", torch.nn.Linear(2, 3, bias=False), to_ones)


def keep(nb):
    """What a run leaves of a training and of something computed; then the notebook's cells with TRAIN = False."""
    train(nb)
    model, history = train_linear(nb)
    assert nb.once("pairs", lambda: [(1, np.float64(0.5))]) == [[1, 0.5]], "as it will be read"
    nb.plt.figure().savefig(nb.data.out / "figures" / "picture.png")
    nb.finish("Answer", "picture", None)
    again = load_module(nb.NAME, data=True, DATA="demo", OUT=nb.OUT, TRAIN=False, SAVED=nb.SAVED)
    return model, history, again


def test_train_false_gives_back_what_was_trained(kept):
    model, history, again = keep(kept)
    loaded, read = train_linear(again)
    assert torch.equal(loaded.weight, model.weight)
    assert torch.equal(loaded.weight, torch.ones(3, 2))
    assert not loaded.weight.requires_grad
    assert read == history == {"loss": [2.0, 1.0]}
    assert again.once("pairs", lambda: 1 / 0) == [[1, 0.5]]
    with pytest.raises(KeyError, match="other"):
        again.once("other", lambda: 1)


def test_a_finished_run_leaves_its_metrics_and_no_state(kept):
    keep(kept)
    metrics = json.loads(Path(kept.SAVED, "figures", f"{kept.NAME}_metrics.json").read_text())
    assert (metrics["mode"], metrics["split"], metrics["n_train"], metrics["n_test"]) == ("demo", "demo", 1500, 297)
    assert metrics["versions"]["numpy"] == np.__version__
    assert not [path for path in Path(kept.SAVED, "state").rglob("*") if path.is_file()]


def test_metrics_of_another_split_are_refused(kept):
    kept.data.split = "default"
    with pytest.raises(AssertionError, match="the saved run is of the split default: set TRAIN = True"):
        keep(kept)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("fault", ["truncated", "of another shape", "of other names", "a program"])
def test_a_checkpoint_that_does_not_fit_is_refused(kept, tmp_path, fault):
    *_, again = keep(kept)
    path = Path(kept.SAVED, "checkpoints", "toy.pt")
    states = {"of another shape": {"weight": torch.ones(2, 2)}, "of other names": {"w": torch.ones(3, 2)}}
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        torch.save(states.get(fault, {"weight": Malicious(str(tmp_path / "was_run"))}), path)
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        train_linear(again)
    assert not (tmp_path / "was_run").exists()

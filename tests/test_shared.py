"""The three shared cells: device and precision, each rung of the data ladder, what is kept and what is resumed."""

import hashlib
import json
import math
import os
import pickle
import socket
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NOTEBOOKS, UNREACHABLE, cells, load_module

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture
def nb(tmp_path):
    """Shared and other definitions with an empty data folder."""
    yield load_module(NOTEBOOKS[0], DATA=str(tmp_path / "data"), OUT=str(tmp_path / "out"))
    socket.setdefaulttimeout(None)


def git_blob(content):
    """Git's id of a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def idx_files(n_train, n_test, seed=0):
    """The four files of a synthetic data set of random images: {name: bytes}."""
    rng, files = np.random.default_rng(seed), {}
    for part, n in (("train", n_train), ("t10k", n_test)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">4i", 2051, n, 28, 28) + images.tobytes()
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, n) + labels.tobytes()
    return files


def publish(nb, name, files, there=FILES):
    """Make these files the published ones of a data set, and place some of them in the data folder."""
    nb.PUBLISHED[name] = " ".join(git_blob(files[file])[:12] for file in FILES)
    raw = Path(nb.DATA, name, "raw")
    for file in there:
        raw.mkdir(parents=True, exist_ok=True)
        (raw / file).write_bytes(files[file])
    return raw


def test_digests_are_gits():
    assert git_blob(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_local_files_come_first(nb, offline, capsys):
    files = idx_files(60, 20)
    publish(nb, "MNIST", files)
    data = nb.load_data("MNIST")
    assert (data.split, data.label, data.banner, data.out) == ("default", "", "", Path(nb.OUT))
    assert data.x_train.shape == (60, 28, 28)
    assert data.x_train.dtype == torch.uint8
    assert data.y_train.dtype == torch.int64
    assert data.x_test.cpu().numpy().tobytes() == files[FILES[2]][16:]
    assert data.y_test.tolist() == list(files[FILES[3]][8:])
    assert data.blobs == {f"MNIST/{file}": git_blob(files[file]) for file in FILES}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("fault", ["truncated", "altered", "empty", "of another shape"])
def test_bad_local_file_is_named_and_refused(nb, fault):
    files = idx_files(60, 20)
    raw, content = publish(nb, "MNIST", files), files[FILES[0]]
    bad = {"truncated": content[:-100], "altered": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}
    bad["of another shape"] = struct.pack(">4i", 2051, 60, 14, 56) + content[16:]
    (raw / FILES[0]).write_bytes(bad[fault])
    with pytest.raises(ValueError, match=rf"MNIST/raw/{FILES[0]} is truncated or altered: delete it"):
        nb.load_data("MNIST")


def test_torchvision_comes_second(nb, monkeypatch):
    files = idx_files(60, 20)
    publish(nb, "MNIST", files, there=[])

    def download(self):
        Path(self.raw_folder).mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            Path(self.raw_folder, file).write_bytes(content)

    monkeypatch.setattr(nb.datasets.MNIST, "download", download)
    assert len(nb.load_data("MNIST").x_train) == 60
    kept = sorted(path.name for path in Path(nb.DATA).rglob("*") if path.is_file())
    assert kept == sorted(FILES)


def openml_answer(files):
    """What fetch_openml returns for the files of a data set: pixels (70000, 784) and labels as strings."""
    pixels = np.frombuffer(files[FILES[0]][16:] + files[FILES[2]][16:], np.uint8)
    labels = np.frombuffer(files[FILES[1]][8:] + files[FILES[3]][8:], np.uint8)
    return pixels.reshape(-1, 784).astype(np.int64), labels.astype(str)


@pytest.mark.parametrize("order", ["right", "wrong"])
def test_openml_comes_third_and_its_order_is_checked(nb, offline, monkeypatch, order):
    files = idx_files(60000, 10000)
    raw = publish(nb, "KMNIST", files, there=[])
    x, y = openml_answer(files)
    if order == "wrong":
        x, y = np.roll(x, 10000, axis=0), np.roll(y, 10000)
    asked = {}

    def fetch_openml(name, **options):
        asked[name] = options["version"]
        return x, y

    monkeypatch.setattr(nb, "fetch_openml", fetch_openml)
    if order == "wrong":
        with pytest.raises(ValueError, match="is truncated or altered: delete it"):
            nb.load_data("KMNIST")
        return
    data = nb.load_data("KMNIST")
    assert asked == {"Kuzushiji-MNIST": 1}
    assert (data.split, len(data.x_train), len(data.x_test)) == ("default", 60000, 10000)
    assert all((raw / file).read_bytes() == files[file] for file in FILES)


def test_a_host_that_never_answers_is_given_up(nb, monkeypatch, capsys):
    server, silent = socket.create_server(("127.0.0.1", 0)), []
    threading.Thread(target=lambda: silent.append(server.accept()), daemon=True).start()
    mirror = f"http://127.0.0.1:{server.getsockname()[1]}/"
    monkeypatch.setattr(nb.datasets.FashionMNIST, "mirrors", [mirror])
    nb.CONNECT_TIMEOUT = 0.5

    def fetch_openml(*args, **options):
        raise TimeoutError(f"timed out after {socket.getdefaulttimeout()} s")

    monkeypatch.setattr(nb, "fetch_openml", fetch_openml)
    assert nb.load_data("FashionMNIST").split == "demo"
    said = capsys.readouterr().out
    assert silent, "the silent host was asked"
    assert "trying torchvision's mirrors" in said
    assert "trying OpenML: failed (TimeoutError: timed out after 0.5 s)" in said
    server.close()


def test_no_network_at_all_gives_the_labelled_demo_each_time(nb, offline, capsys, recwarn):
    """The real torchvision and scikit-learn are called, and both fail for want of a network, in a line each."""
    for _ in range(2):
        data = nb.load_data("FashionMNIST")
        said = capsys.readouterr().out.splitlines()
        assert [line.count("failed") for line in said] == [1, 1]
        assert UNREACHABLE in said[1]
        assert (data.split, len(data.x_train), len(data.x_test), data.blobs) == ("demo", 1500, 297, {})
        assert (data.x_train.shape[1:], data.y_train.dtype) == ((28, 28), torch.int64)
        assert (data.x_train.min(), data.x_train.max()) == (0, 255)
        assert "DEMO" in data.label
        assert "DEMO" in data.banner
        assert data.out == Path(nb.OUT, "demo")
    assert not [w for w in recwarn if "network" in str(w.message)]


def test_demo_writes_under_runs_even_when_out_is_the_repository(nb):
    nb.DATA, nb.OUT = "demo", "."
    assert nb.load_data("MNIST").out == Path("runs/demo")


def test_training_images_alone_may_be_missing_if_asked(nb, offline):
    files = idx_files(60, 20)
    publish(nb, "KMNIST", files, there=FILES[2:])
    data = nb.load_data("KMNIST", enough=FILES[2:])
    assert (data.split, data.x_train, data.y_train, len(data.x_test)) == ("default", None, None, 20)
    assert set(data.blobs) == {f"KMNIST/{file}" for file in FILES[2:]}
    assert nb.load_data("KMNIST").split == "demo"


def test_the_real_files_are_the_published_ones(nb, real_data):
    nb.DATA = real_data
    for name, expected in {"MNIST": 4, "FashionMNIST": 4}.items():
        assert len(nb.read_files(name)) == expected


# Device and precision


def set_up(monkeypatch, device, units=False, **parameters):
    """The set-up cell on a machine whose accelerator is `device`, CUDA's with or without bf16 units."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device != "cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: units or including_emulation)
    nb = SimpleNamespace(SEED=0, PRECISION="auto", **parameters)
    exec(cells(NOTEBOOKS[0], "shared")[0], vars(nb))
    return nb


@pytest.mark.parametrize(("device", "units"), [("cuda", True), ("cuda", False), ("mps", False)])
def test_accelerators_use_bf16_if_they_have_the_units(monkeypatch, device, units):
    nb = set_up(monkeypatch, device, units)
    assert (nb.DEVICE.type, nb.BF16) == (device, units)


@pytest.mark.parametrize(("flags", "units"), [("avx512_bf16", True), ("avx512f", False), ("asimd bf16", True)])
def test_processors_use_bf16_if_they_have_the_units(monkeypatch, flags, units):
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : {flags}\n")
    assert set_up(monkeypatch, "cpu").BF16 is units


def test_precision_can_be_set(tmp_path):
    for precision, units in ("fp32", False), ("bf16", True):
        assert load_module(NOTEBOOKS[0], OUT=str(tmp_path), PRECISION=precision).BF16 is units


# Keeping


@pytest.fixture
def kept(nb, tmp_path):
    """The definitions with the demo in place, so that there is something to keep."""
    nb.DATA, nb.SAVED, nb.EPOCHS = "demo", str(tmp_path / "out" / "demo"), 3
    nb.data = nb.load_data("MNIST")
    return nb


def train(nb, name="toy", stop=None, **arguments):
    """A training of random numbers. Returns its parts' weights and its history; leaves after the epoch `stop`."""
    torch.manual_seed(1)
    model, history = torch.nn.Linear(2, 2), []
    for epoch in nb.epochs(name, {"model": model}, history, **arguments):
        with torch.no_grad():
            model.weight += torch.randn(2, 2)
        history.append({"epoch": epoch, "weight": model.weight.sum().item()})
        if epoch == stop:
            return None  # in this epoch: the one before is the last that was kept
    return model.weight.detach(), history


def test_a_stopped_run_ends_with_the_numbers_of_an_uninterrupted_one(kept, capsys):
    weight, history = train(kept, "other")
    train(kept, stop=3)
    capsys.readouterr()
    resumed, again = train(kept)
    assert "toy: goes on after epoch 2" in capsys.readouterr().out
    assert torch.equal(resumed, weight)
    assert again == history


NAMES = {line.split(" = ")[0] for line in cells(NOTEBOOKS[0], "parameters")[0].splitlines() if " = " in line}


def test_the_parameters_of_a_run_are_those_of_the_parameters_cell(nb):
    assert sorted(nb.PARAMETERS) == sorted(NAMES)


@pytest.mark.parametrize("parameter", sorted(NAMES - {"OUT", "NAME"}))  # these two name the folder of the state
def test_nothing_is_resumed_after_a_change_of_any_parameter(kept, capsys, parameter):
    train(kept, stop=3)
    value = getattr(kept, parameter)
    other = (*value, 1) if isinstance(value, tuple) else f"{value}!" if isinstance(value, str) else value + 1
    setattr(kept, parameter, other)
    train(kept)
    assert "goes on" not in capsys.readouterr().out


def test_nothing_is_resumed_with_other_arguments_or_data(kept, capsys):
    train(kept, stop=3, seed=0)
    train(kept, stop=3, seed=1)
    kept.data.blobs = {"MNIST/train": "another"}
    train(kept, stop=3, seed=1)
    assert "goes on" not in capsys.readouterr().out


def test_numbers_that_are_not_finite_stop_the_run_and_what_was_before_is_kept(kept):
    history = []

    def diverge():
        for epoch in kept.epochs("toy", {}, history):
            history.append({"loss": math.nan if epoch == 2 else 1.0})

    with pytest.raises(FloatingPointError, match=r"toy broke down in epoch 2\. Try another SEED"):
        diverge()
    state = torch.load(kept.data.out / "state" / kept.NAME / "toy.pt", weights_only=True)
    assert state["history"] == [{"loss": 1.0}]


def test_a_full_disk_leaves_the_old_file(nb, tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.pt"
    nb.save(path, {"w": torch.ones(2)})

    def full(state, file):
        Path(file).write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        nb.save(path, {"w": torch.zeros(2)})
    assert torch.equal(torch.load(path, weights_only=True)["w"], torch.ones(2))


def train_linear(nb):
    """train_or_load of a linear model whose training makes its weights ones."""

    def to_ones(model):
        torch.nn.init.ones_(model.weight)
        return [{"loss": 2.0}, {"loss": 1.0}]

    return nb.train_or_load("toy", torch.nn.Linear(2, 3, bias=False), to_ones)


def test_train_false_gives_back_what_was_trained(kept):
    model, history = train_linear(kept)
    computed = kept.once("pairs", lambda: [(1, np.float64(0.5))])
    (kept.data.out / "figures").mkdir()
    kept.finish()
    kept.METRICS.clear()
    kept.TRAIN = False
    loaded, again = train_linear(kept)
    assert torch.equal(loaded.weight, model.weight)
    assert not loaded.weight.requires_grad
    assert again == history == {"loss": [2.0, 1.0]}
    assert kept.once("pairs", lambda: 1 / 0) == computed == [[1, 0.5]]


def test_metrics_of_another_split_or_without_the_key_are_refused(kept, tmp_path):
    kept.TRAIN, path = False, tmp_path / "out" / "demo" / "figures" / f"{kept.NAME}_metrics.json"
    with pytest.raises(FileNotFoundError, match=path.name):
        kept.once("key", lambda: 1)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"split": "default"}))
    with pytest.raises(RuntimeError, match="of the split default, not demo: set TRAIN = True"):
        kept.once("key", lambda: 1)
    path.write_text(json.dumps({"split": "demo"}))
    with pytest.raises(KeyError, match="key"):
        kept.once("key", lambda: 1)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


FAULTS = "empty", "truncated", "of another shape", "of other names", "a program", "a pickle"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_does_not_fit_is_refused_with_its_name(kept, tmp_path, capsys, fault):
    train_linear(kept)
    (kept.data.out / "figures").mkdir()
    kept.finish()
    path, evil = kept.data.out / "checkpoints" / "toy.pt", {"weight": Malicious(str(tmp_path / "was_run"))}
    contents = {"empty": b"", "truncated": path.read_bytes()[:-100], "a pickle": pickle.dumps(evil)}
    states = {"of another shape": {"weight": torch.ones(2, 2)}, "of other names": {"w": torch.ones(3, 2)}}
    if fault in contents:
        path.write_bytes(contents[fault])
    else:
        torch.save(states.get(fault, evil), path)
    kept.TRAIN = False
    with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError)):
        train_linear(kept)
    assert f"loading {path}" in capsys.readouterr().out
    assert not (tmp_path / "was_run").exists()


def test_a_finished_run_leaves_its_metrics_and_no_state(kept):
    train(kept)
    (kept.data.out / "figures").mkdir()
    kept.finish()
    metrics = json.loads((kept.data.out / "figures" / f"{kept.NAME}_metrics.json").read_text())
    assert (metrics["mode"], metrics["split"], metrics["n_train"], metrics["n_test"]) == ("demo", "demo", 1500, 297)
    assert metrics["versions"]["numpy"] == np.__version__
    assert not [file for _, _, files in os.walk(kept.data.out / "state") for file in files]

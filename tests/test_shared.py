"""The three shared cells: device and precision, each rung of the data ladder, what is kept and what is resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import FILES, NOTEBOOKS, ROOT, UNREACHABLE, code_cells, execute, idx_files, load_module, publish

MACHINES = [  # accelerator, whether CUDA has bf16 units, the processor's flags, PRECISION, whether bf16 is used
    ("cuda", True, "", "auto", True),
    ("cuda", False, "avx512_bf16", "auto", False),
    ("mps", False, "asimd bf16", "auto", False),
    ("cpu", False, "avx512_bf16", "auto", True),
    ("cpu", False, "avx512f", "auto", False),
    ("cpu", False, "avx512f", "bf16", True),
    ("cpu", False, "avx512_bf16", "fp32", False),
]


@pytest.mark.parametrize(("device", "units", "flags", "precision", "used"), MACHINES)
def test_bf16_is_used_where_the_device_has_its_units(monkeypatch, device, units, flags, precision, used):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device != "cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: units or including_emulation)
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, **how: flags if p.name == "cpuinfo" else read(p, **how))
    found = {"SEED": 0, "PRECISION": precision, "os": os}
    exec(code_cells(NOTEBOOKS[0], "shared")[0].source, found)
    assert (found["DEVICE"].type, found["BF16"]) == (device, used)


@pytest.fixture
def nb(tmp_path):
    """Shared and other definitions with an empty data folder."""
    return load_module(NOTEBOOKS[0], OUT=str(tmp_path / "out"), DATA=str(tmp_path / "data"))


@pytest.mark.parametrize("source", ["the data folder", "torchvision", "OpenML"])
def test_each_source_comes_in_its_turn(nb, offline, monkeypatch, capsys, source):
    files = idx_files(60000, 10000)
    raw = publish(nb, "KMNIST", files, there=FILES if source == "the data folder" else [])
    if source == "torchvision":
        monkeypatch.setattr(nb.datasets.KMNIST, "download", lambda self: publish(nb, "KMNIST", files))
    x = np.frombuffer(files[FILES[0]][16:] + files[FILES[1]][16:], np.uint8).reshape(-1, 784)
    y = np.frombuffer(files[FILES[2]][8:] + files[FILES[3]][8:], np.uint8).astype(str)  # as OpenML has them
    nb.fetch_openml = lambda name, version, **_: {("Kuzushiji-MNIST", 1): (x, y)}[name, version]
    data, said = nb.load_data(*nb.published), capsys.readouterr().out
    assert ("torchvision" in said, "OpenML" in said) == (source != "the data folder", source == "OpenML")
    assert all((raw / file).read_bytes() == files[file] for file in FILES)
    assert (data.split, data.label, data.banner, data.out) == ("default", "", "", Path(nb.OUT))
    assert (data.x_train.shape, data.x_train.dtype, data.y_train.dtype) == ((60000, 28, 28), torch.uint8, torch.int64)
    assert data.x_test.numpy().tobytes() == files[FILES[1]][16:]
    assert data.y_test.tolist() == list(files[FILES[3]][8:])
    assert data.blobs == dict(zip([f"KMNIST/{file}" for file in FILES], nb.published[2]))


def test_what_openml_has_is_not_kept_if_it_is_not_the_published_file(nb, offline, capsys):
    publish(nb, "MNIST", idx_files(60, 20), there=[])
    nb.fetch_openml = lambda *_, **__: (np.zeros((70000, 784)), np.zeros(70000))
    assert nb.load_data(*nb.published).split == "demo"
    assert f"failed: ValueError: its {FILES[0]} is not the published file" in capsys.readouterr().out
    assert not [path for path in Path(nb.DATA).rglob("*") if path.is_file()]


@pytest.mark.parametrize("change", [lambda c: c[:-100], lambda c: c[:-1] + bytes([c[-1] ^ 1])])
def test_truncated_or_altered_local_file_is_named_and_refused(nb, change):
    path = publish(nb, "MNIST", idx_files(60, 20)) / FILES[0]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"MNIST/raw/{FILES[0]} is truncated or altered: delete it"):
        nb.load_data(*nb.published)


def test_no_network_at_all_gives_the_labelled_demo(nb, offline, capsys, recwarn):
    """The real torchvision or scikit-learn does not fail in a line, or is left to wait for longer than it may."""
    data = nb.load_data("FashionMNIST", "Fashion-MNIST", FILES)
    said = capsys.readouterr().out.splitlines()
    assert [line.startswith("failed: ") for line in said] == [False, True, False, True]
    assert said[0].endswith("trying torchvision's mirrors")
    assert said[2].endswith("trying OpenML")
    assert UNREACHABLE in said[3]
    assert {*offline} == {nb.CONNECT_TIMEOUT}
    assert (data.x_train.min(), data.x_train.max()) == (0, 255)
    assert data.label.startswith("DEMO")
    assert not [w for w in recwarn if "network" in str(w.message)]


def test_demo_writes_under_runs_even_when_out_is_the_repository(nb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nb.DATA, nb.OUT = "demo", "."
    assert nb.load_data("MNIST", "mnist_784", FILES).out == Path("runs/demo")
    assert [str(path) for path in Path().iterdir()] == ["runs"]


@pytest.fixture
def kept(tmp_path):
    """The definitions with the demo in place, so that there is something to keep."""
    return load_module(NOTEBOOKS[0], "data", DATA="demo", OUT=str(tmp_path), SAVED=str(tmp_path / "demo"))


def train(nb, stop=None, seed=0, length=3, **arguments):
    """A training of nothing, left within epoch `stop`, which is not kept. Returns after how many it went on."""
    history, done = [], []
    for epoch in nb.epochs("toy", {}, history, seed, length, **arguments):
        done.append(epoch)
        history.append({"epoch": epoch})
        if epoch == stop:
            break
    return done[0] - 1


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_nothing_is_resumed_after_a_change_of_any_parameter_argument_or_of_the_data(notebook, tmp_path):
    nb = load_module(notebook, "data", DATA="demo", OUT=str(tmp_path))
    (cell,) = code_cells(notebook, "parameters")
    execute(code_cells(notebook, "shared")[0], nb)  # as where all is run again
    assert sorted(nb.PARAMETERS) == sorted(re.findall(r"^([A-Z_\d]+) = ", cell.source, re.MULTILINE))
    changes = [partial(setattr, nb, name, "another") for name in {*nb.PARAMETERS} - {"OUT", "NAME"}]  # of the folder
    changes += [
        partial(setattr, nb, "BF16", not nb.BF16),
        partial(setattr, nb, "DEVICE", torch.device("meta")),
        partial(setattr, nb.data, "blobs", {"MNIST/train": "other"}),
    ]
    for change in changes:
        assert (train(nb, stop=3), train(nb, stop=3)) == (0, 2), change  # it is resumed as long as nothing changes
        change()
    for arguments in {"seed": 1}, {"length": 4}, {"option": 1}:
        assert (train(nb, stop=3), train(nb, **arguments)) == (0, 0), arguments


def test_a_state_that_cannot_be_put_in_place_leaves_the_last_one(kept):
    train(kept, stop=3)
    with patch("os.replace", side_effect=OSError("the disk is gone")), pytest.raises(OSError, match="gone"):
        train(kept)
    assert train(kept) == 2


def test_what_is_remembered_is_computed_again_only_in_another_run_or_with_train_false(kept):
    values = iter(range(9))

    def remember():
        return kept.remember("pair", lambda: (next(values), np.float64(0.5)))

    assert remember() == remember() == [0, 0.5], "as METRICS will be read"
    kept.SEED += 1
    assert remember() == remember() == [1, 0.5]
    kept.TRAIN = False
    assert (remember()[0], remember()[0]) == (2, 3)


def test_calls_made_ahead_are_made_in_other_processes_and_remembered(kept, two_cores):
    names = "a", "b", "c"
    kept.ahead([partial(kept.remember, name, os.getpid) for name in names])
    found = {kept.remember(name, os.getpid) for name in names}
    assert len(found - {os.getpid()}) == 3


PROGRAM = """
import pathlib, signal, sys, time, conftest, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by background jobs of a shell
torch.get_num_threads = lambda: 2
out = pathlib.Path(sys.argv[1])
notebook = conftest.load_module("hw5_rbm")
notebook.ahead([lambda: ((out / "started").touch(), time.sleep(3), (out / "ended").touch())] * 2)
"""


@pytest.mark.parametrize("signal", [signal.SIGINT, signal.SIGKILL])
def test_trainings_end_with_the_notebook(signal, tmp_path, two_cores):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT / "tests", stderr=subprocess.DEVNULL)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal)  # to it alone
    process.wait()
    time.sleep(4)
    assert not (tmp_path / "ended").exists()


def train_linear(nb):
    """train_or_load of a linear model whose training makes its weights ones."""

    def to_ones(model):
        torch.nn.init.ones_(model.weight)
        return [{"loss": 2.0}, {"loss": 1.0}]

    return nb.train_or_load("toy", torch.nn.Linear(2, 3, bias=False), to_ones)


@pytest.fixture
def again(kept):
    """The notebook's cells with TRAIN = False, after a run with a training, a picture and something computed."""
    train(kept)
    train_linear(kept)
    assert kept.once("pairs", lambda: [(1, np.float64(0.5))]) == [[1, 0.5]], "as it will be read"
    kept.plt.figure().savefig(kept.data.out / "figures" / "picture.png")
    kept.finish("Answer", "picture", None)
    return load_module(kept.NAME, "data", DATA="demo", OUT=kept.OUT, TRAIN=False, SAVED=kept.SAVED)


def test_a_finished_run_leaves_metrics_and_weights_that_train_false_reads_and_no_state(again):
    loaded, history = train_linear(again)
    assert torch.equal(loaded.weight, torch.ones(3, 2))
    assert not loaded.weight.requires_grad
    assert history == {"loss": [2.0, 1.0]}
    assert again.once("pairs", lambda: 1 / 0) == [[1, 0.5]]
    with pytest.raises(KeyError, match="other"):
        again.once("other", lambda: 1)
    assert not [path for path in Path(again.SAVED, "state").rglob("*") if path.is_file()]
    train(again, stop=3)
    again.finish("Answer", "picture", None)
    assert train(again) == 2, "a look with TRAIN = False drops what a stopped run has kept"


@pytest.mark.parametrize(("name", "value"), [("split", '"default"'), ("SEED", "99")])
def test_metrics_of_another_run_are_refused(again, name, value):
    path = Path(again.SAVED, "figures", f"{again.NAME}_metrics.json")
    path.write_text(re.sub(f'"{name}": [^,]*', f'"{name}": {value}', path.read_text()))
    with pytest.raises(AssertionError, match=f"the saved run has {name} = .*: set TRAIN = True"):
        load_module(again.NAME, "data", DATA="demo", OUT=again.OUT, TRAIN=False, SAVED=again.SAVED)


@pytest.mark.parametrize("saved", [{"weight": torch.ones(2, 2)}, {"w": torch.ones(3, 2)}])
def test_a_checkpoint_that_does_not_fit_is_named_and_refused(again, capsys, saved):
    torch.save(saved, Path(again.SAVED, "checkpoints", "toy.pt"))
    with pytest.raises(RuntimeError, match="weight"):
        train_linear(again)
    assert "toy.pt" in capsys.readouterr().out

"""Load the notebooks' own definition cells and run whole notebooks, for the tests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import matplotlib
import nbformat
import numpy as np
import papermill
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

matplotlib.use("Agg")
os.environ["TQDM_DISABLE"] = "1"
ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.stem for path in ROOT.glob("hw5_*.ipynb"))


def cells(notebook, *tags):
    """Sources of a notebook's code cells that have one of the tags, in order."""
    found = nbformat.read(ROOT / f"{notebook}.ipynb", as_version=4).cells
    return [c.source for c in found if c.cell_type == "code" and set(tags) & set(c.metadata.get("tags", []))]


def load_module(notebook, **parameters):
    """Execute the parameters (overridden), shared and definition cells as a module: nb.fit, setattr(nb, ...)."""
    module = ModuleType(notebook)
    exec("\n".join(cells(notebook, "parameters")), vars(module))
    vars(module).update(parameters)
    for number, source in enumerate(cells(notebook, "shared", "definitions")):
        exec(compile(source, f"{notebook}.ipynb, definition cell {number}", "exec"), vars(module))
    return module


def run_notebook(notebook, folder, **parameters):
    """Run a whole notebook into a folder. Returns the executed notebook."""
    parameters = {"OUT": str(folder), "DATA": "demo", **parameters}
    source, target = ROOT / f"{notebook}.ipynb", folder / f"{notebook}.ipynb"
    folder.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(source, target, parameters, cwd=folder, progress_bar=False)
    return nbformat.read(target, as_version=4)


def heed_interrupts():
    """For a process to be started: SIGINT works, also where the tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_in_training(module, folder, run, by=signal.SIGKILL):
    """Start the module's fit_small(folder) as a process, and kill it once the run has saved its first epochs.

    Returns how many epochs it had done.
    """
    code = f"from {module} import fit_small; fit_small({str(folder)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tests", preexec_fn=heed_interrupts)
    state = folder / "state" / f"{run}.pt"
    while not state.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(by)
    assert process.wait() == -by
    return len(torch.load(state, weights_only=True)["history"])


def read_metrics(folder, notebook):
    """The metrics file that a run left in a folder."""
    return json.loads((folder / "figures" / f"{notebook}_metrics.json").read_text())


class DeviceRules(TorchDispatchMode):
    """Counts copies from and to the device, and refuses float64 on it, which Apple's MPS does not have."""

    def __init__(self):
        super().__init__()
        self.device, self.copies = torch.device("cuda"), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before, after = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), result))
        assert not [t for t in after if t.is_cuda and t.dtype == torch.float64], f"float64 on the device: {func}"
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.copies += len({t.device.type for t in [*before, *after]}) > 1
        return result

    def read(self, value):
        """A stand-in for a method of tensors that reads their number: this one, always."""

        def reader(tensor):
            self.copies += tensor.is_cuda
            return value

        return reader


@contextmanager
def fake_gpu():
    """A CUDA device of fake tensors: no GPU is needed, mixed devices and NumPy on the device are refused.

    Yields the DeviceRules, with .device and .copies. Every number read from a tensor is 1. Networks have to be made
    on the device. Fake tensors have no backward pass, so it does nothing, and no optimiser has anything to do.
    """

    def numpy(tensor):
        assert tensor.device.type == "cpu", "NumPy asked for a tensor on the GPU"
        return np.ones(tensor.shape, np.float32)

    rules = DeviceRules()
    methods = {"item": rules.read(1.0), "__bool__": rules.read(True), "numpy": numpy}
    read = patch.multiple(torch.Tensor, backward=lambda *_, **__: None, **methods)

    def another(value, *memo):  # a deep copy of fake tensors cannot be used beside them
        if not isinstance(value, torch.nn.Module):
            return deepcopy(value, *memo)
        with rules.device:
            return type(value)()

    deep, average = patch("copy.deepcopy", another), patch("torch.optim.swa_utils.deepcopy", another)
    with read, deep, average, FakeTensorMode(), rules:
        yield rules


UNREACHABLE = "network is unreachable"


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(UNREACHABLE)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def real_data():
    """The data folder with the real files; skips the test where there is none."""
    folder = os.environ.get("HW5_DATA", str(ROOT / "data"))
    datasets = "MNIST", "KMNIST", "FashionMNIST"
    if not all(Path(folder, name, "raw", "t10k-images-idx3-ubyte").exists() for name in datasets):
        pytest.skip("needs the real data: set HW5_DATA to the folder that holds them")
    return str(Path(folder).resolve())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

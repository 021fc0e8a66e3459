"""What tests share: notebooks' definitions as modules, whole runs, synthetic data files, and a fake GPU."""

import hashlib
import json
import os
import re
import socket
import sys
from contextlib import contextmanager
from functools import cache
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
os.environ["HW5_OUT"] = "runs"  # the default; where it is set, no progress bar is shown
ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.stem for path in ROOT.glob("hw5_*.ipynb"))
FILES = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"
UNREACHABLE = "network is unreachable"


@cache
def read_notebook(notebook):
    return nbformat.read(ROOT / f"{notebook}.ipynb", as_version=4)


def code_cells(notebook, *tags):
    """A notebook's code cells, in order: all, or those that have one of the tags."""
    found = [cell for cell in read_notebook(notebook).cells if cell.cell_type == "code"]
    return [cell for cell in found if not tags or {*tags} & {*cell.metadata.get("tags", [])}]


def execute(cell, module):
    exec(compile(cell.source, f"{module.__name__}.ipynb, {cell.id}", "exec"), vars(module))


def load_module(notebook, *more, **parameters):
    """Execute parameters (overridden), shared, definition and more cells, by tag, as a module: nb.fit, nb.OUT."""
    module = ModuleType(notebook)
    for cell in code_cells(notebook, "parameters", "shared", "definitions", *more):
        execute(cell, module)
        if "parameters" in cell.metadata["tags"]:
            vars(module).update(parameters)
    return module


SMALL = {  # parameters of a small problem, and its number of training images
    "hw5_gan": ({"EPOCHS": 4, "LEARNING_RATE": 2e-5, "STEPS": 8, "RULER_STEPS": 40, "AUTOENCODER_EPOCHS": 2}, 192),
    "hw5_rbm": ({"EPOCHS": 40, "AIS_STEPS": 200}, 256),
    "hw5_vae": ({"EPOCHS": 60, "AVERAGE_EVERY": 2, "GAP_STEPS": 60}, 384),
}


def small_problem(notebook, out, **parameters):
    """A notebook's definitions with a few digits in place, so that something can be learned in seconds."""
    options, n = SMALL[notebook]
    nb = load_module(notebook, "data", DATA="demo", OUT=str(out), **options | parameters)
    nb.x_train = nb.x_train[:n]
    if notebook == "hw5_gan":
        torch.manual_seed(0)
        nb.ruler = nb.new_classifier().eval()
    if notebook == "hw5_vae":
        nb.y_train, nb.x_val, nb.y_val = nb.y_train[:n], nb.x_val[:128], nb.y_val[:128]
        nb.SETS |= {"train": (nb.x_train, nb.y_train), "val": (nb.x_val, nb.y_val)}
        nb.labels = {name: c.numpy() for name, (_, c) in nb.SETS.items()}
    return nb


@pytest.fixture
def nb(request, tmp_path):
    """In test_gan.py, test_rbm.py and test_vae.py: the small problem of the notebook that the file is named after."""
    return small_problem(request.path.stem.replace("test", "hw5"), tmp_path)


def run_notebook(notebook, folder, **parameters):
    """Run a whole notebook into a folder, on the demo data, its t-SNE maps unfinished. Returns it executed."""
    parameters = {"OUT": str(folder), "DATA": "demo", **parameters}
    source = (ROOT / f"{notebook}.ipynb").read_text().replace("TSNE(random", "TSNE(max_iter=250, random")
    target = folder / f"{notebook}.ipynb"
    target.write_text(source)
    papermill.execute_notebook(target, target, parameters, cwd=folder, progress_bar=False)
    return nbformat.read(target, as_version=4)


def top(notebook):
    """What stands at a notebook's top: its answer, on one line, and its table's rows, as Markdown has them."""
    _, answer, _, table = next(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    rows = re.findall("<tr.*?</tr>", table.data["text/html"], re.DOTALL)
    rows = ["| " + " | ".join(re.findall("<t[hd].*?>(.*?)</t[hd]>", row)) + " |" for row in rows]
    return " ".join(answer.data["text/markdown"].split()), rows


def read_metrics(folder, notebook):
    return json.loads((folder / "figures" / f"{notebook}_metrics.json").read_text())


def idx_files(n_train, n_test):
    """The four files of a synthetic data set of random images, in the IDX format: {name: bytes}."""
    rng, files = np.random.default_rng(0), {}
    for file in FILES:
        n = n_train if "train" in file else n_test
        shape, top = ((n, 28, 28), 256) if "images" in file else ((n,), 10)
        magic = b"\0\0\x08" + bytes([len(shape)])  # of unsigned bytes
        files[file] = magic + np.array(shape, ">i4").tobytes() + rng.integers(0, top, shape, np.uint8).tobytes()
    return files


def publish(nb, name, files, there=FILES):
    """Make these files the published ones of a data set, and place some of them in the data folder."""
    ids = [hashlib.sha1(b"blob %d\0" % len(files[file]) + files[file]).hexdigest()[:12] for file in FILES]
    nb.published = name, {"KMNIST": "Kuzushiji-MNIST"}.get(name, name), ids  # as load_data is asked
    raw = Path(nb.DATA, name, "raw")
    for file in there:
        raw.mkdir(parents=True, exist_ok=True)
        (raw / file).write_bytes(files[file])
    return raw


class NoDouble(TorchDispatchMode):
    """Refuses float64 on the device, which Apple's MPS does not have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        assert not [t for t in made if t.is_cuda and t.dtype == torch.float64], f"float64 on the device: {func}"
        return result


def to_cuda(module, *args, **options):
    """Module.to for fake tensors, whose data cannot be exchanged."""
    for part in module.modules():
        weights, buffers = part.named_parameters(recurse=False), part.named_buffers(recurse=False)
        part._parameters.update({k: torch.nn.Parameter(p.detach().to("cuda"), p.requires_grad) for k, p in weights})
        part._buffers.update({k: b.to("cuda") for k, b in buffers})
    return module


@contextmanager
def fake_gpu():
    """A CUDA device of fake tensors: no mixed devices, float64 or NumPy; no backward pass; each number read is 1."""

    def numpy(tensor):
        assert tensor.device.type == "cpu", "NumPy asked for a tensor on the GPU"
        return np.ones(tensor.shape, np.float32)

    methods = {"item": lambda tensor: 1.0, "__bool__": lambda tensor: True, "numpy": numpy}
    read = patch.multiple(torch.Tensor, backward=lambda *_, **__: None, **methods)
    copied = patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True)
    with read, copied, patch.object(torch.nn.Module, "to", to_cuda), FakeTensorMode(), NoDouble():
        yield


@pytest.fixture
def two_cores(monkeypatch):
    """Two processes at a time, whatever torch has been told."""
    if sys.platform != "linux" or torch.cuda.is_available():
        pytest.skip("trainings are side by side only on Linux, where there is no GPU")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.fixture
def offline(monkeypatch):
    """No network. Gives the timeouts, in seconds, that stood for each try."""
    timeouts = []

    def refuse(*args, **kwargs):
        timeouts.append(socket.getdefaulttimeout())
        raise OSError(UNREACHABLE)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield timeouts
    socket.setdefaulttimeout(None)


@pytest.fixture(autouse=True, scope="session")
def _on_the_cpu():
    """Definitions are tested on the CPU, also where there is a GPU; whole notebooks run on what there is."""
    with patch("torch.accelerator.is_available", lambda: False):
        yield

"""Each rung of the data ladder, and files that are not what they should be."""

import socket
import struct
import threading

import numpy as np
import pytest
import torch
from conftest import NOTEBOOKS, load_definitions, refused

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture
def notebook(tmp_path):
    """Shared definitions with an empty data folder."""
    yield load_definitions(NOTEBOOKS[0], DATA=str(tmp_path / "data"), OUT=str(tmp_path / "out"))
    socket.setdefaulttimeout(None)


def idx_files(n_train, n_test, seed=0):
    """The four files of a synthetic data set of random images: {name: bytes}."""
    rng, files = np.random.default_rng(seed), {}
    for part, n in (("train", n_train), ("t10k", n_test)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">4i", 2051, n, 28, 28) + images.tobytes()
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, n) + labels.tobytes()
    return files


def publish(notebook, name, files):
    """Make these files the published ones of a data set."""
    notebook["BLOBS"][name] = " ".join(notebook["blob_id"](files[file]) for file in FILES)


def place(notebook, name, files):
    raw = notebook["Path"](notebook["DATA"], name, "raw")
    raw.mkdir(parents=True)
    for file, content in files.items():
        (raw / file).write_bytes(content)
    return raw


def no_network(notebook, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_blob_id_is_gits(notebook):
    assert notebook["blob_id"](b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_local_files_come_first(notebook, monkeypatch):
    files = idx_files(60, 20)
    publish(notebook, "MNIST", files)
    place(notebook, "MNIST", files)
    no_network(notebook, monkeypatch)
    data = notebook["load_data"]("MNIST")
    assert data.mode == "full"
    assert data.x_train.shape == (60, 28, 28)
    assert data.x_train.dtype == torch.uint8
    assert data.x_test.cpu().numpy().tobytes() == files["t10k-images-idx3-ubyte"][16:]
    assert data.y_test.tolist() == list(files["t10k-labels-idx1-ubyte"][8:])
    assert list(data.blobs.values()) == notebook["BLOBS"]["MNIST"].split()


@pytest.mark.parametrize("fault", ["truncated", "altered", "empty", "of another shape"])
def test_bad_local_file_is_named_and_refused(notebook, fault):
    files = idx_files(60, 20)
    publish(notebook, "MNIST", files)
    raw = place(notebook, "MNIST", files)
    content = files["train-images-idx3-ubyte"]
    bad = {"truncated": content[:-100], "altered": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}
    bad["of another shape"] = struct.pack(">4i", 2051, 60, 14, 56) + content[16:]
    (raw / "train-images-idx3-ubyte").write_bytes(bad[fault])
    said = r"MNIST/raw/train-images-idx3-ubyte is truncated or altered.*delete it"
    with refused(f"data file {fault}", ValueError, said):
        notebook["load_data"]("MNIST")


def test_torchvision_comes_second(notebook, monkeypatch):
    files = idx_files(60, 20)
    publish(notebook, "MNIST", files)

    def download(self):
        notebook["Path"](self.raw_folder).mkdir(parents=True)
        for file, content in files.items():
            notebook["Path"](self.raw_folder, file).write_bytes(content)

    monkeypatch.setattr(notebook["torchvision"].datasets.MNIST, "download", download)
    data = notebook["load_data"]("MNIST")
    assert data.mode == "full"
    assert len(data.x_train) == 60
    kept = sorted(path.name for path in notebook["Path"](notebook["DATA"]).rglob("*") if path.is_file())
    assert kept == sorted(FILES)


def openml_answer(files):
    """What fetch_openml returns for the files of a data set: pixels (70000, 784) and labels as strings."""
    pixels = np.frombuffer(files[FILES[0]][16:] + files[FILES[2]][16:], np.uint8)
    labels = np.frombuffer(files[FILES[1]][8:] + files[FILES[3]][8:], np.uint8)
    return pixels.reshape(-1, 784).astype(np.int64), labels.astype(str)


@pytest.mark.parametrize("order", ["right", "wrong"])
def test_openml_comes_third_and_its_order_is_checked(notebook, monkeypatch, order):
    files = idx_files(60000, 10000)
    publish(notebook, "KMNIST", files)
    x, y = openml_answer(files)
    if order == "wrong":
        x, y = np.roll(x, 10000, axis=0), np.roll(y, 10000)
    asked = {}

    def fetch_openml(name, **options):
        asked[name] = options["version"]
        return x, y

    no_network(notebook, monkeypatch)
    notebook["fetch_openml"] = fetch_openml
    data = notebook["load_data"]("KMNIST")
    assert asked == {"Kuzushiji-MNIST": 1}
    if order == "right":
        assert data.mode == "full"
        assert (len(data.x_train), len(data.x_test)) == (60000, 10000)
        assert len(notebook["verified_files"]("KMNIST", notebook["DATA"])) == 4
    else:
        assert data.mode == "demo"
        assert notebook["verified_files"]("KMNIST", notebook["DATA"]) == {}


def test_a_host_that_never_answers_is_given_up(notebook, monkeypatch, capsys):
    server = socket.create_server(("127.0.0.1", 0))
    silent = []
    threading.Thread(target=lambda: silent.append(server.accept()), daemon=True).start()
    mirror = f"http://127.0.0.1:{server.getsockname()[1]}/"
    monkeypatch.setattr(notebook["torchvision"].datasets.FashionMNIST, "mirrors", [mirror])
    notebook["CONNECT_TIMEOUT"] = 0.5

    def fetch_openml(*args, **options):
        raise TimeoutError(f"timed out after {socket.getdefaulttimeout()} s")

    notebook["fetch_openml"] = fetch_openml
    data = notebook["load_data"]("FashionMNIST")
    said = capsys.readouterr().out
    assert silent, "the silent host was asked"
    assert "trying torchvision's mirrors" in said
    assert "trying OpenML" in said
    assert "timed out after 0.5 s" in said
    assert data.mode == "demo"
    server.close()


def test_no_network_at_all_gives_the_labelled_demo(notebook, monkeypatch):
    no_network(notebook, monkeypatch)
    out = notebook["OUT"]
    data = notebook["load_data"]("FashionMNIST")
    assert (data.mode, len(data.x_train), len(data.x_test), data.blobs) == ("demo", 1500, 297, {})
    assert data.x_train.shape[1:] == (28, 28)
    assert (data.x_train.min(), data.x_train.max()) == (0, 255)
    assert "DEMO" in notebook["LABEL"]
    assert "DEMO" in notebook["BANNER"]
    assert notebook["OUT"] == f"{out}/demo"


def test_demo_writes_under_runs_even_when_out_is_the_repository(notebook):
    notebook.update(DATA="demo", OUT=".")
    notebook["load_data"]("MNIST")
    assert notebook["OUT"] == "runs/demo"


def test_training_images_alone_may_be_missing_if_asked(notebook, monkeypatch):
    files = idx_files(60, 20)
    publish(notebook, "KMNIST", files)
    place(notebook, "KMNIST", {file: files[file] for file in FILES[2:]})
    no_network(notebook, monkeypatch)
    data = notebook["load_data"]("KMNIST", test_only_ok=True)
    assert data.mode == "full"
    assert data.x_train is None
    assert data.y_train is None
    assert len(data.x_test) == 20
    assert notebook["load_data"]("KMNIST").mode == "demo"


def test_the_real_files_are_the_published_ones(notebook, real_data):
    for name, expected in {"MNIST": 4, "FashionMNIST": 4}.items():
        assert len(notebook["verified_files"](name, real_data)) == expected

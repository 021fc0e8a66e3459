"""Saving, loading and resuming: nothing good is lost, nothing bad is trusted."""

import os
import pickle

import pytest
import torch
from conftest import NOTEBOOKS, load_definitions, refused


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    return load_definitions(NOTEBOOKS[0], OUT=str(tmp_path_factory.mktemp("out")))


def test_state_comes_back_as_saved(notebook, tmp_path):
    state = {"weights": torch.randn(3, 4), "history": [{"epoch": 1, "train": 2.5}], "name": "vae"}
    notebook["save_state"](tmp_path / "new" / "a.pt", state)
    back = notebook["load_state"](tmp_path / "new" / "a.pt")
    assert torch.equal(back.pop("weights"), state.pop("weights"))
    assert back == state


def test_full_disk_keeps_the_old_file_and_names_the_remedy(notebook, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    notebook["write"](path, b"good")

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with refused("disk full", OSError, r"cannot write .*a\.pt \(No space left on device\): free some space"):
        notebook["write"](path, b"newer")
    assert path.read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["a.pt"]


def test_unwritable_folder_names_the_remedy(notebook, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with refused("output folder not writable", OSError, r"cannot write .* set OUT to a folder that can be written"):
        notebook["write"](tmp_path / "file" / "a.pt", b"x")


def test_missing_checkpoint_is_named(notebook, tmp_path):
    with refused("TRAIN = False without a checkpoint", FileNotFoundError, r"vae\.pt is missing: .*TRAIN = True"):
        notebook["load_state"](tmp_path / "vae.pt")


@pytest.mark.parametrize(
    ("text", "fault", "error", "match"),
    [
        (None, "TRAIN = False without a metrics file", FileNotFoundError, "is missing: .*TRAIN = True"),
        ('{"split": "def', "metrics file truncated", RuntimeError, "is damaged"),
        ('{"seed": 0}', "metrics file of something else", RuntimeError, "is damaged"),
        ('{"split": "demo"}', "TRAIN = False on other data", RuntimeError, "is of the split demo, .* TRAIN = True"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(notebook, tmp_path, text, fault, error, match):
    notebook.update(METRICS={"split": "default"}, SAVED=str(tmp_path))
    if text:
        notebook["write"](tmp_path / "figures" / "hw5_vae_metrics.json", text.encode())
    with refused(fault, error, rf"hw5_vae_metrics\.json {match}"):
        notebook["saved_metrics"]("hw5_vae")


@pytest.mark.parametrize("keep", [0, 10, -100])
def test_truncated_checkpoint_is_refused(notebook, tmp_path, keep):
    notebook["save_state"](tmp_path / "a.pt", {"w": torch.zeros(1000)})
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:keep])
    with refused("checkpoint truncated", RuntimeError, r"b\.pt is damaged"):
        notebook["load_state"](tmp_path / "b.pt")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_executable_pickle_is_refused_and_not_run(notebook, tmp_path, save):
    save({"w": Malicious(str(tmp_path / "was_run"))}, tmp_path / "evil.pt")
    with refused("checkpoint with a program in it (not run)", RuntimeError, r"evil\.pt is damaged"):
        notebook["load_state"](tmp_path / "evil.pt")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("state", [{"w": torch.zeros(3)}, {"v": torch.zeros(2)}, {}])
def test_checkpoint_of_another_model_is_refused(notebook, tmp_path, state):
    notebook["save_state"](tmp_path / "other.pt", state)
    with refused("checkpoint of another model", RuntimeError, r"other\.pt belongs to another model"):
        notebook["load_state"](tmp_path / "other.pt", like={"w": torch.zeros(2)})


def test_resume_restores_parts_history_and_random_numbers(notebook):
    model = torch.nn.Linear(2, 2)
    notebook["save_run"]("toy", {"seed": 1}, {"model": model}, [{"epoch": 1}])
    expected_draw, expected_weight = torch.randn(4), model.weight.detach().clone()
    torch.manual_seed(99)
    torch.nn.init.zeros_(model.weight)
    assert notebook["resume_run"]("toy", {"seed": 2}, {"model": model}) == []
    assert torch.equal(model.weight, torch.zeros(2, 2))
    assert notebook["resume_run"]("toy", {"seed": 1}, {"model": model}) == [{"epoch": 1}]
    assert torch.equal(model.weight, expected_weight)
    assert torch.equal(torch.randn(4), expected_draw)

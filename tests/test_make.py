"""The Makefile's answers when a run fails or is stopped."""

import os
import shutil
import signal
import subprocess
import time

import nbformat
import pytest
from conftest import ROOT, heed_interrupts

COMMAND = ["make", "--assume-old=.venv/installed", "run", "NOTEBOOKS=hw5_vae.ipynb"]


@pytest.fixture
def clone(tmp_path):
    """A folder with what `make run` of one notebook needs, and the tests' own .venv."""
    if not (ROOT / ".venv" / "bin" / "papermill").exists():
        pytest.skip("needs the .venv that make sets up")
    for name in ("Makefile", "hw5_vae.ipynb"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    return tmp_path


def test_altered_data_end_the_run_with_their_name_and_a_failure(clone):
    file = clone / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not what was published")
    environment = {**os.environ, "HW5_DATA": str(clone / "data")}
    run = subprocess.run(COMMAND, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert f"{file} is truncated or altered" in run.stderr + run.stdout


def test_ctrl_c_ends_the_run_with_a_line_and_a_failure(clone):
    options = {"cwd": clone, "env": {**os.environ, "HW5_DATA": "demo"}, "preexec_fn": heed_interrupts}
    with (clone / "log").open("w") as log:
        run = subprocess.Popen(COMMAND, stdout=log, stderr=log, start_new_session=True, **options)
        while not (clone / "runs" / "demo" / "state" / "hw5_vae" / "vae.pt").exists():
            assert run.poll() is None, (clone / "log").read_text()
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        assert run.wait(timeout=60) != 0
    (line,) = [line for line in (clone / "log").read_text().splitlines() if "To go on" in line]
    assert line.endswith("To go on: make run")
    assert (clone / "runs" / "demo" / "state" / "hw5_vae" / "vae.pt").exists()


def test_a_notebook_that_had_finished_on_the_same_data_is_left_as_it_is(clone):
    """A trivial notebook in place of a real one; the state between the two runs is that of a killed one."""
    for name, source in ("one", "print('ran')"), ("two", "1 / 0"):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, clone / f"{name}.ipynb")
    command = [*COMMAND[:-1], "NOTEBOOKS=one.ipynb two.ipynb"]

    def run(data):
        environment = {**os.environ, "HW5_DATA": data}
        return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)

    first, second, elsewhere = run("here"), run("here"), run("there")
    assert all(one.returncode for one in (first, second, elsewhere)), "the second notebook fails each time"
    assert ["ran" in one.stdout for one in (first, second, elsewhere)] == [True, False, True]
    assert "one.ipynb had finished" in second.stdout
    (clone / "two.ipynb").write_text((clone / "one.ipynb").read_text())
    assert run("there").returncode == 0
    assert "had finished" not in run("there").stdout, "after a complete run the next one starts anew"

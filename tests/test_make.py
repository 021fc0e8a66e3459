"""The Makefile's answers when a run fails or is stopped."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import FAULTS, ROOT, heed_interrupts

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
        while not (clone / "runs" / "demo" / "state" / "vae.pt").exists():
            assert run.poll() is None, (clone / "log").read_text()
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        assert run.wait(timeout=60) != 0
    (line,) = [line for line in (clone / "log").read_text().splitlines() if "To go on" in line]
    assert line.endswith('make run NOTEBOOKS="hw5_vae.ipynb"')
    assert (clone / "runs" / "demo" / "state" / "vae.pt").exists()
    FAULTS["Ctrl-C of make run"] = line

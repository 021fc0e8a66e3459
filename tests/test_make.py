"""What `make run` does when a notebook fails or it is stopped, with trivial notebooks in place of the real ones."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import nbformat
import pytest
from conftest import ROOT

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


@pytest.fixture
def start(tmp_path):
    """Function that starts `make run` of notebooks, {name: source of its cell}, in a folder with the tests' .venv."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)

    def start(notebooks, data="demo"):
        for name, source in notebooks.items():
            cell = nbformat.v4.new_code_cell(source, id="only")
            nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": KERNEL}), tmp_path / name)
        command = f"make --assume-old=.venv/installed run HW5_DATA={data}".split()
        command.append(f"NOTEBOOKS={' '.join(notebooks)}")
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where tests run in the background
        return subprocess.Popen(command, cwd=tmp_path, **pipe, start_new_session=True, preexec_fn=heed)

    return start


def test_ctrl_c_ends_the_run_with_a_line_and_a_failure(start, tmp_path):
    run = start({"one.ipynb": "import time\nopen('begun', 'w').close()\ntime.sleep(60)"})
    while not list(tmp_path.rglob("begun")):
        assert run.poll() is None
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert [line for line in said.splitlines() if "To go on" in line] == ["Stopped. To go on: make run"]


def test_a_notebook_that_had_finished_on_the_same_data_is_left_as_it_is(start):
    """After a failure or a kill, which leave the same state, too much or too little is run again."""

    def run(data, second="1 / 0"):
        process = start({"one.ipynb": "print('ran')", "two.ipynb": second}, data)
        said, _ = process.communicate()
        return process.returncode != 0, "ran" in said.splitlines(), "one.ipynb had finished" in said

    assert run("here") == (True, True, False)
    assert run("here") == (True, False, True)
    assert run("there") == (True, True, False)
    assert run("there", "2") == (False, False, True)
    assert run("there", "2") == (False, True, False), "after a complete run the next one starts anew"

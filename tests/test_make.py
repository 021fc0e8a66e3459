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
from conftest import NOTEBOOKS, ROOT, read_notebook


@pytest.fixture
def start(tmp_path):
    """Function that starts `make run` of notebooks, {name: source of its cell}, in a folder with the tests' .venv."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)

    def start(notebooks, data="demo"):
        for name, source in notebooks.items():
            cell = nbformat.v4.new_code_cell(source, id="only")
            metadata = read_notebook(NOTEBOOKS[0]).metadata
            nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=metadata), tmp_path / name)
        command = f"make --no-print-directory --assume-old=.venv/installed run HW5_DATA={data}".split()
        command.append(f"NOTEBOOKS={' '.join(notebooks)}")
        output = {"stdout": (tmp_path / "log").open("w"), "stderr": subprocess.STDOUT}
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where tests run in the background
        return subprocess.Popen(command, cwd=tmp_path, **output, start_new_session=True, preexec_fn=heed)

    return start


def test_ctrl_c_ends_the_run_with_a_line_and_a_failure(start, tmp_path):
    run = start({"one.ipynb": "import time\nopen('begun', 'w').close()\ntime.sleep(60)"})
    while not list(tmp_path.rglob("begun")):
        assert run.poll() is None
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    assert run.wait(timeout=60) != 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if "To go on" in line] == ["Stopped. To go on: make run"]


def test_a_notebook_that_had_finished_on_the_same_data_is_left_as_it_is(start, tmp_path):
    """After a failure or a kill, which leave the same state, too much or too little is run again."""

    def run(data, second="1 / 0"):
        failed = start({"one.ipynb": "print('has run')", "two.ipynb": second}, data).wait() != 0
        log = (tmp_path / "log").read_text()
        assert log.startswith("one.ipynb"), "what was said before a notebook's output is lost"
        assert "Executing " in log, "no progress bar"
        assert "WARNING" not in log
        return failed, "has run" in log, "one.ipynb had finished" in log

    assert run("here") == (True, True, False)
    assert run("here") == (True, False, True)
    assert run("there") == (True, True, False)
    assert run("there", "2") == (False, False, True)
    assert run("there", "2") == (False, True, False), "after a complete run the next one starts anew"

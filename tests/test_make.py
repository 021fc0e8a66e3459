"""What `make run` does after a notebook failed, with trivial notebooks in place of the real ones."""

import shutil
import subprocess
import sys

import nbformat
from conftest import NOTEBOOKS, ROOT, read_notebook


def test_a_notebook_that_had_finished_on_the_same_data_is_left_as_it_is(tmp_path):
    """After a failure or a kill, which leave the same state, too much or too little is run again."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    metadata, log = read_notebook(NOTEBOOKS[0]).metadata, tmp_path / "log"

    def run(data, second="1 / 0"):
        for name, source in ("one.ipynb", "print('has run')"), ("two.ipynb", second):
            cell = nbformat.v4.new_code_cell(source, id="only")
            nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=metadata), tmp_path / name)
        command = f"make --no-print-directory --assume-old=.venv/installed run HW5_DATA={data}".split()
        command.append("NOTEBOOKS=one.ipynb two.ipynb")
        with log.open("w") as file:
            done = subprocess.run(command, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT, check=False)
        said = log.read_text()
        assert said.startswith("one.ipynb"), "what was said before a notebook's output is lost"
        assert "Executing " in said, "no progress bar"
        assert "WARNING" not in said
        return done.returncode != 0, "has run" in said, "one.ipynb had finished" in said

    assert run("here") == (True, True, False)
    assert run("here") == (True, False, True)
    assert run("there") == (True, True, False)
    assert run("there", "2") == (False, False, True)
    assert run("there", "2") == (False, True, False), "after a complete run the next one starts anew"

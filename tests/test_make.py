"""What `make run` does after a failure, and `make report` with what is there; with trivial notebooks for the real."""

import shutil
import subprocess
import sys

import nbformat
from conftest import NOTEBOOKS, ROOT, read_notebook


def make(folder, *arguments, **notebooks):
    """Run make on notebooks of one cell each. Returns its exit status and what it said."""
    shutil.copy(ROOT / "Makefile", folder)
    if not (folder / ".venv").exists():
        (folder / ".venv").symlink_to(sys.prefix)
    for name, source in notebooks.items():
        cell, metadata = nbformat.v4.new_code_cell(source, id="only"), read_notebook(NOTEBOOKS[0]).metadata
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=metadata), folder / f"{name}.ipynb")
    command = ["make", "--no-print-directory", "--assume-old=.venv/installed", *arguments]
    with (folder / "log").open("w") as log:  # a file, as both write to it in turn
        command.append("NOTEBOOKS=" + " ".join(f"{name}.ipynb" for name in notebooks))
        done = subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=False)
    return done.returncode, (folder / "log").read_text()


def test_a_notebook_that_had_finished_on_the_same_data_is_left_as_it_is(tmp_path):
    """After a failure or a kill, which leave the same state, too much or too little is run again."""

    def run(data, second="1 / 0"):
        failed, said = make(tmp_path, "run", f"HW5_DATA={data}", one="print('has run')", two=second)
        assert said.startswith("one.ipynb"), "what was said before a notebook's output is lost"
        assert "Executing " in said, "no progress bar"
        assert "WARNING" not in said
        return failed != 0, "has run" in said, "one.ipynb had finished" in said

    assert run("here") == (True, True, False)
    assert run("here") == (True, False, True)
    assert run("there") == (True, True, False)
    assert run("there", "2") == (False, False, True)
    assert run("there", "2") == (False, True, False), "after a complete run the next one starts anew"


WRITES = """
import os, pathlib
for file in {}:
    path = pathlib.Path(os.environ["HW5_OUT"], file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('"mode": "full"')
"""


def test_a_demo_for_want_of_data_has_not_finished(tmp_path):
    notebooks = {"one": WRITES.format(["demo/figures/one_metrics.json"]), "two": "1 / 0"}
    for _ in range(2):
        failed, said = make(tmp_path, "run", **notebooks)
        assert failed
        assert "had finished" not in said


def test_a_report_of_one_notebook_leaves_the_others_alone(tmp_path):
    for folder in "figures", "checkpoints":
        (tmp_path / folder).mkdir()
    for name in "one", "two":
        files = [f"figures/{name}_metrics.json", f"checkpoints/{name}.pt"]
        failed, said = make(tmp_path, "report", **{name: WRITES.format(files)})
        assert not failed, said
        assert [(tmp_path / file).read_text() for file in files] == ['"mode": "full"'] * 2
        (tmp_path / files[0]).write_text("newer")
    assert (tmp_path / "figures" / "one_metrics.json").read_text() == "newer"


def test_a_demo_replaces_no_report(tmp_path):
    metrics = tmp_path / "runs" / "report" / "figures" / "one_metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('"mode": "full"')  # of an earlier report
    failed, said = make(tmp_path, "report", one="")
    assert failed
    assert "a demo is not a report" in said

"""What `make run` and `make report` do again and replace; scripts stand for notebooks, the shell for papermill."""

import shutil
import subprocess
import sys

import nbformat
from conftest import NOTEBOOKS, ROOT, read_notebook

SHELL = (  # $RECIPE: the process id of the recipe's shell
    "EXECUTE=sh -c 'echo runs $$0; RECIPE=$$PPID sh ./$$0 && cp $$0 $$1'",
    "CLEAN=true",
)
WRITE = 'mkdir -p $HW5_OUT/{0}; echo \'"mode": "full"\' > $HW5_OUT/{0}/{1}\n'  # into a folder, a file


def make(folder, *arguments, tools=SHELL, **notebooks):
    """Run make on notebooks. Returns whether it failed, which notebooks were run, and what it said."""
    shutil.copy(ROOT / "Makefile", folder)
    for name, text in notebooks.items():
        (folder / f"{name}.ipynb").write_text(text)
    command = ["make", "--no-print-directory", "--assume-old=.venv/installed", *arguments, *tools]
    with (folder / "log").open("w") as log:  # a file, as both write to it in turn
        command.append("NOTEBOOKS=" + " ".join(f"{name}.ipynb" for name in notebooks))
        done = subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=False)
    said = (folder / "log").read_text()
    return done.returncode != 0, [name for name in notebooks if f"runs {name}" in said], said


def test_a_person_sees_a_progress_bar_what_is_printed_and_no_warning(tmp_path):
    (tmp_path / ".venv").symlink_to(sys.prefix)
    cell, metadata = nbformat.v4.new_code_cell("print('is run')", id="only"), read_notebook(NOTEBOOKS[0]).metadata
    text = nbformat.writes(nbformat.v4.new_notebook(cells=[cell], metadata=metadata))
    failed, _, said = make(tmp_path, "run", tools=[], one=text)
    assert (failed, "Executing " in said, "is run" in said, "WARNING" in said) == (False, True, True, False)
    assert said.startswith("one.ipynb"), "what was said before a notebook's output is lost"


def test_a_notebook_that_had_finished_on_the_same_data_is_left_as_it_is(tmp_path):
    """After a failure or a kill, which leave the same state, too much or too little is run again."""

    def run(data, second="exit 1"):
        return make(tmp_path, "run", f"HW5_DATA={data}", one="", two=second)[:2]

    assert run("here") == (True, ["one", "two"])
    assert run("here") == (True, ["two"])
    assert run("there") == (True, ["one", "two"])
    assert make(tmp_path, "run", "HW5_DATA=there", "PARAMETERS=-p M 3", one="", two="exit 1")[1] == ["one", "two"]
    assert make(tmp_path, "run", "HW5_DATA=there", one=":", two="exit 1")[1] == ["one", "two"], "one has changed"
    assert make(tmp_path, "run", "HW5_DATA=there", three="")[:2] == (False, ["three"])
    assert make(tmp_path, "run", "HW5_DATA=there", one=":", two="exit 1")[1] == ["two"], "another run forgets one"
    assert run("there", "exit 0") == (False, ["two"])
    assert run("there", "exit 0") == (False, ["one", "two"]), "after a complete run the next one starts anew"


def test_a_demo_for_want_of_data_has_not_finished(tmp_path):
    demo = WRITE.format("demo/figures", "one_metrics.json")
    assert make(tmp_path, "run", one=demo, two="")[:2] == (False, ["one", "two"])
    assert make(tmp_path, "run", one=demo, two="")[:2] == (False, ["one"])


def test_a_run_that_is_stopped_says_how_to_go_on(tmp_path):
    failed, ran, said = make(tmp_path, "run", one="kill $RECIPE; sleep 0.2", two="")
    assert (failed, ran, "Stopped. To go on" in said) == (True, ["one"], True)
    assert not (tmp_path / "runs" / "one.ipynb").exists(), "what was running has gone on to its end"


def test_a_report_leaves_the_files_of_others_alone_and_is_no_demo(tmp_path):
    for name in "one", "two":
        files = ("figures", f"{name}_metrics.json"), ("checkpoints", f"{name}.pt")
        for folder, _ in files:
            (tmp_path / folder).mkdir(exist_ok=True)
        failed, _, said = make(tmp_path, "report", **{name: "".join(WRITE.format(*file) for file in files)})
        assert not failed, said
        assert [tmp_path.joinpath(*file).read_text() for file in files] == ['"mode": "full"\n'] * 2
        tmp_path.joinpath(*files[0]).write_text("newer")
    assert (tmp_path / "figures" / "one_metrics.json").read_text() == "newer"
    failed, _, said = make(tmp_path, "report", two="")  # whose metrics of the report before are still there
    assert (failed, "a demo is not a report" in said) == (True, True)

"""What holds for the repository as a whole."""

import base64
import json
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT, cells


def test_shared_cells_are_identical():
    shared = {tuple(cells(notebook, "shared")) for notebook in NOTEBOOKS}
    assert [len(sources) for sources in shared] == [3]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_is_self_contained_and_in_order(notebook):
    found = nbformat.read(ROOT / f"{notebook}.ipynb", as_version=4)
    nbformat.validate(found)
    code = [c for c in found.cells if c.cell_type == "code"]
    assert "parameters" in code[1].metadata["tags"]  # after the results at the top
    shared = [c for c in code if "shared" in c.metadata["tags"]]
    assert shared[0] is code[2]
    assert all(c.metadata["jupyter"]["source_hidden"] and c.metadata["cellView"] == "form" for c in shared)
    assert all(len(c.source.splitlines()) <= 60 for c in code if c not in shared)
    modules = {m for c in code for m in re.findall(r"^(?:from|import) (\w+)", c.source, re.MULTILINE)}
    known = {"IPython", "matplotlib", "numpy", "pandas", "sklearn", "torch", "torchvision", "tqdm"}
    assert modules - set(sys.stdlib_module_names) <= known


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_committed_outputs_are_one_clean_real_run(notebook):
    found = nbformat.read(ROOT / f"{notebook}.ipynb", as_version=4)
    code = [c for c in found.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    outputs = [output for c in code for output in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "DEMO" not in json.dumps(outputs)
    assert not [m for m in (found.metadata, *(c.metadata for c in found.cells)) if "papermill" in m]  # times, paths
    assert json.loads((ROOT / "figures" / f"{notebook}_metrics.json").read_text())["mode"] == "full"


def test_committed_figures_are_the_notebooks_own():
    shown = set()
    for notebook in NOTEBOOKS:
        found = nbformat.read(ROOT / f"{notebook}.ipynb", as_version=4)
        outputs = [o for c in found.cells if c.cell_type == "code" for o in c.outputs]
        shown |= {base64.b64decode(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})}
    assert {path.read_bytes() for path in (ROOT / "figures").glob("*.png")} == shown


def test_ruff():
    for command in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, check=True)


def test_no_data_is_committed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert "ubyte" not in tracked

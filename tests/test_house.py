"""What holds for the repository as a whole: the notebooks' form, what is committed, what README quotes."""

import base64
import json
import re
import sys

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT, code_cells, read_metrics, read_notebook, top

README = (ROOT / "README.md").read_text()


def test_shared_cells_are_identical():
    shared = [[cell.source for cell in code_cells(notebook, "shared")] for notebook in NOTEBOOKS]
    assert len(shared[0]) == 3
    assert shared == [shared[0]] * 3


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_is_self_contained(notebook):
    nbformat.validate(read_notebook(notebook))
    code, shared = code_cells(notebook), code_cells(notebook, "shared")
    assert all(c.metadata["jupyter"]["source_hidden"] and c.metadata["cellView"] == "form" for c in shared)
    modules = {m for c in code for m in re.findall(r"^(?:from|import) (\w+)", c.source, re.MULTILINE)}
    known = {"IPython", "matplotlib", "numpy", "pandas", "sklearn", "threadpoolctl", "torch", "torchvision", "tqdm"}
    assert modules - {*sys.stdlib_module_names} <= known
    assert not [c for c in code if "weights_only=False" in c.source]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_committed_outputs_are_in_order_clean_and_of_real_data(notebook):
    found, code = read_notebook(notebook), code_cells(notebook)
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
    assert "DEMO" not in re.sub('"image/png": "[^"]*"', "", json.dumps(outputs(notebook)))
    assert not [m for m in (found.metadata, *(c.metadata for c in found.cells)) if "papermill" in m]  # times, paths


def test_committed_figures_are_the_notebooks_own():
    pictures = [o.get("data", {}).get("image/png", "") for notebook in NOTEBOOKS for o in outputs(notebook)]
    shown = {base64.b64decode(picture) for picture in pictures if picture}
    assert {path.read_bytes() for path in (ROOT / "figures").glob("*.png")} == shown


NAMED = {  # metrics that were asked for by name
    "hw5_gan": """probe_{}_accuracy_mean probe_pixels_{}_accuracy_mean supervised_{}_accuracy_mean frechet_test epochs
        finetuned_{}_accuracy_mean frechet_floor two_sample_accuracy two_sample_accuracy_floor digit_share_min""",
    "hw5_rbm": """m{}_mse_train m{}_mse_test m{}_mse_test_std m{}_bits_mse_test m{}_mse_test_gibbs5 m{}_pca_mse_test
        m16_loglik_test m16_loglik_test_se m64_loglik_test_ais_se m256_loglik_test_ais_se ppca{}_loglik_test
        m64_persistent_loglik_test_ais_se m256_persistent_loglik_test_ais_se updates""",
    "hw5_vae": """{}_train_nelbo {}_val_nelbo {}_test_nelbo {}_test_nelbo_std {}_test_bce {}_test_kl {}_test_iwae
        {}_aggregate_kl {}_class_information {}_epochs pixel_entropy_floor unlabelled_difference_se""",
}
COLUMNS = {"hw5_gan": ("val", "test"), "hw5_rbm": (16, 64, 256), "hw5_vae": ("vae", "cvae")}


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_metrics_are_complete_and_readme_quotes_the_notebooks_top(notebook):
    metrics, (answer, rows) = read_metrics(ROOT, notebook), top(read_notebook(notebook))
    required = "device training_precision versions seconds_total split runs " + NAMED[notebook]
    assert {key.format(column) for key in required.split() for column in COLUMNS[notebook]} <= metrics.keys()
    assert metrics["mode"] == "full"
    assert answer in " ".join(README.split())
    assert not {*rows} - {*README.splitlines()}


def test_readme_says_what_a_run_costs_which_split_problem_2_used_and_links_to_what_exists():
    metrics = [read_metrics(ROOT, name) for name in NOTEBOOKS]
    assert " | ".join(["\n| minutes", *(f"{m['seconds_total'] / 60:.1f}" for m in metrics)]) + " |" in README
    stand_in = {"default": False, "t10k-only 6:1": True}[metrics[1]["split"]]
    assert ("split 6 : 1 (see" in README) == stand_in
    assert ("Stand-in split" in outputs("hw5_rbm")[0]["data"]["text/html"]) == stand_in
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

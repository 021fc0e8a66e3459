"""What holds for the repository as a whole: the notebooks' form, what is committed, and README's numbers."""

import base64
import json
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import NOTEBOOKS, REBUILT, ROOT, code_cells, read_metrics, read_notebook


def test_shared_cells_are_identical():
    shared = [[cell.source for cell in code_cells(notebook, "shared")] for notebook in REBUILT]
    assert len(shared[0]) == 3
    assert shared == [shared[0]] * 2


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_is_self_contained_and_in_order(notebook):
    nbformat.validate(read_notebook(notebook))
    code, shared = code_cells(notebook), code_cells(notebook, "shared")
    assert "parameters" in code[1].metadata["tags"]  # after the results at the top
    assert code[2] == shared[0]
    assert all(c.metadata["jupyter"]["source_hidden"] and c.metadata["cellView"] == "form" for c in shared)
    assert all(len(c.source.splitlines()) <= 60 for c in code if c not in shared)
    modules = {m for c in code for m in re.findall(r"^(?:from|import) (\w+)", c.source, re.MULTILINE)}
    known = {"IPython", "matplotlib", "numpy", "pandas", "sklearn", "torch", "torchvision", "tqdm"}
    assert modules - {*sys.stdlib_module_names} <= known


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_committed_outputs_are_one_clean_real_run(notebook):
    found, code = read_notebook(notebook), code_cells(notebook)
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
    assert "DEMO" not in json.dumps(outputs(notebook))
    assert not [m for m in (found.metadata, *(c.metadata for c in found.cells)) if "papermill" in m]  # times, paths


def test_committed_figures_are_the_notebooks_own():
    pictures = [o.get("data", {}).get("image/png", "") for notebook in NOTEBOOKS for o in outputs(notebook)]
    shown = {base64.b64decode(picture) for picture in pictures if picture}
    assert {path.read_bytes() for path in (ROOT / "figures").glob("*.png")} == shown


def test_ruff():
    for command in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, check=True)


def test_no_data_is_committed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert "ubyte" not in tracked


# README states nothing that the metrics files do not


README = (ROOT / "README.md").read_text()
ACCURACIES = [f"{{}}_{key}" for key in ("train_accuracy_mean", "test_accuracy_mean", "test_accuracy_std")]
SIZES, MODELS = (16, 64, 256), ("vae", "cvae")
ROWS = {  # notebook, format and, for each row, the metrics in its columns; None: no number
    ("hw5_gan", ".2%"): {
        label: [key.format(method) for key in ACCURACIES]
        for label, method in {
            "linear layer on the frozen discriminator": "probe",
            "linear layer on the same network as an autoencoder's encoder": "probe_autoencoder",
            "linear layer on the same network with random weights": "probe_random",
            "linear layer on pixels": "probe_pixels",
            "nearest neighbours in pixels": "knn_pixels",
            "all layers, from scratch": "supervised",
            "all layers, from the discriminator's weights": "finetuned",
            "all layers, from scratch, images shifted": "supervised_shifts",
            "all layers, from the discriminator's weights, images shifted": "finetuned_shifts",
        }.items()
    },
    ("hw5_rbm", ".4f"): {
        "reconstruction error, training images": [f"m{M}_mse_train" for M in SIZES],
        "reconstruction error, test images": [f"m{M}_mse_test" for M in SIZES],
        "PCA with M components, test images": [f"m{M}_pca_mse_test" for M in SIZES],
    },
    ("hw5_rbm", ".0f"): {
        f"log-likelihood, {label}": [first, *(f"m{M}_{key}loglik_test_ais" for M in SIZES[1:])]
        for label, first, key in (
            ("CD-5 as assigned", "m16_loglik_test", ""),
            ("CD-5, σ learned, centred", None, "cd5_centred_"),
            ("persistent chains, σ learned, centred", "m16_persistent_loglik_test", "persistent_"),
        )
    }
    | {"log-likelihood, probabilistic PCA with M factors": [f"ppca{M}_loglik_test" for M in SIZES]},
    ("hw5_vae", ".2f"): {
        "negative ELBO": [f"{model}_test_nelbo" for model in MODELS],
        "importance-weighted bound": [f"{model}_test_iwae" for model in MODELS],
        "the same without the label": ["vae_iwae_same_samples", "cvae_unlabelled_iwae"],
        "nats about the class in z, at least": [f"{model}_class_information" for model in MODELS],
    },
    ("hw5_vae", ".1%"): {
        "nearest neighbours of the same class": [f"{model}_same_class_neighbours" for model in MODELS],
        "class read from the mean μ by a linear probe": [f"{model}_mu_linear_probe" for model in MODELS],
        "class read from the mean μ by k-NN": [f"{model}_mu_knn" for model in MODELS],
    },
}


@pytest.mark.parametrize(("notebook", "form"), ROWS)
def test_readmes_results_are_the_metrics(notebook, form):
    metrics = read_metrics(ROOT, notebook)
    for label, keys in ROWS[notebook, form].items():
        numbers = [format(metrics[key], form) if key else "–" for key in keys]
        assert f"\n| {' | '.join([label, *numbers])} |\n" in README


def test_readme_says_what_a_run_costs_which_split_problem_2_used_and_links_to_what_exists():
    metrics = [read_metrics(ROOT, name) for name in NOTEBOOKS]
    assert " | ".join(["\n| minutes", *(f"{m['seconds_total'] / 60:.1f}" for m in metrics)]) + " |" in README
    stand_in = {"default": False, "t10k-only 6:1": True}[metrics[1]["split"]]
    assert ("split 6 : 1 (see" in README) == stand_in
    assert ("Stand-in split" in outputs("hw5_rbm")[0]["data"]["text/html"]) == stand_in
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

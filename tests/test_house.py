"""What holds for the repository as a whole: the notebooks' form, what is committed, README's numbers."""

import base64
import json
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from conftest import NOTEBOOKS, ROOT, code_cells, read_metrics, read_notebook

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
    assert all(len(c.source.splitlines()) <= 60 for c in code if c not in shared)
    modules = {m for c in code for m in re.findall(r"^(?:from|import) (\w+)", c.source, re.MULTILINE)}
    known = {"IPython", "matplotlib", "numpy", "pandas", "sklearn", "torch", "torchvision", "tqdm"}
    assert modules - {*sys.stdlib_module_names} <= known
    loads = re.findall(r"torch\.load\(.*", "\n".join(c.source for c in code))
    assert all("weights_only=True" in load for load in loads)


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_committed_outputs_are_in_order_clean_and_of_real_data(notebook):
    found, code = read_notebook(notebook), code_cells(notebook)
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
    assert "DEMO" not in json.dumps(outputs(notebook))
    assert not [m for m in (found.metadata, *(c.metadata for c in found.cells)) if "papermill" in m]  # times, paths


def test_committed_figures_are_the_notebooks_own():
    pictures = [o.get("data", {}).get("image/png", "") for notebook in NOTEBOOKS for o in outputs(notebook)]
    shown = {base64.b64decode(picture) for picture in pictures if picture}
    assert {path.read_bytes() for path in (ROOT / "figures").glob("*.png")} == shown


def test_no_data_is_committed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert "ubyte" not in tracked


# What README's tables show, and what else the committed metrics have: {} is what a column is for

COLUMNS = {
    "hw5_gan": ("train_accuracy_mean", "test_accuracy_mean", "test_accuracy_std"),
    "hw5_rbm": (16, 64, 256),
    "hw5_vae": ("vae", "cvae"),
}
ROWS = {
    "hw5_gan": {
        "GAN's discriminator, frozen": "probe_{}:.2%",
        "autoencoder, frozen": "probe_autoencoder_{}:.2%",
        "random weights, frozen": "probe_random_{}:.2%",
        "pixels, linear layer": "probe_pixels_{}:.2%",
        "pixels, nearest neighbours": "knn_pixels_{}:.2%",
        "supervised from scratch": "supervised_{}:.2%",
        "discriminator fine-tuned": "finetuned_{}:.2%",
        "supervised from scratch, shifts": "supervised_shifts_{}:.2%",
        "discriminator fine-tuned, shifts": "finetuned_shifts_{}:.2%",
    },
    "hw5_rbm": {
        "reconstruction error, training images": "m{}_mse_train:.4f",
        "reconstruction error, test images": "m{}_mse_test:.4f",
        "PCA with M components, test images": "m{}_pca_mse_test:.4f",
        "log-likelihood, CD-5 as assigned": "m{}_loglik_test:.0f",
        "log-likelihood, CD-5, improved": "m{}_cd5_centred_loglik_test:.0f",
        "log-likelihood, persistent chains, improved": "m{}_persistent_loglik_test:.0f",
        "log-likelihood, probabilistic PCA with M factors": "ppca{}_loglik_test:.0f",
        "log-likelihood, factor analysis with M factors": "fa{}_loglik_test:.0f",
    },
    "hw5_vae": {
        "negative ELBO (C-VAE: given the label)": "{}_test_nelbo:.2f",
        "negative importance-weighted bound (C-VAE: given the label)": "{}_test_iwae:.2f",
        "nats about the class in z, at least": "{}_class_information:.2f",
        "nearest neighbours of the same class": "{}_same_class_neighbours:.1%",
        "class read from the mean μ by k-NN": "{}_mu_knn:.1%",
        "class read from a draw z by an MLP": "{}_z_mlp:.1%",
    },
}


def readme_row(metrics, notebook, label):
    """A row of README's table: numbers, with their standard errors where the metrics have them."""
    key, form = ROWS[notebook][label].split(":")
    cells = []
    for column in COLUMNS[notebook]:
        of = next((name for name in (key.format(column), key.format(column) + "_ais") if name in metrics), None)
        error = f" ± {metrics[f'{of}_se']:{form}}" if f"{of}_se" in metrics else ""
        cells.append(f"{metrics[of]:{form}}{error}" if of else "–")
    return f"| {' | '.join([label, *cells])} |"


OTHERS = {
    "hw5_gan": """probe_val_accuracy_mean frechet_test frechet_floor two_sample_accuracy two_sample_accuracy_floor
        digit_share_min digit_share_max epochs""",
    "hw5_rbm": """m{}_mse_test_std m{}_bits_mse_test m{}_mse_test_gibbs5 m16_loglik_test_se m64_loglik_test_ais_se
        m256_loglik_test_ais_se m64_persistent_loglik_test_ais_se m256_persistent_loglik_test_ais_se updates""",
    "hw5_vae": """{}_train_nelbo {}_val_nelbo {}_test_nelbo_std {}_test_bce {}_test_kl {}_aggregate_kl {}_epochs
        pixel_entropy_floor unlabelled_difference unlabelled_difference_se cvae_generative_accuracy""",
}


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_metrics_are_complete_and_readmes_tables_show_them(notebook):
    metrics = read_metrics(ROOT, notebook)
    required = "device training_precision versions seconds_total split runs " + OTHERS[notebook]
    assert {key.format(column) for key in required.split() for column in COLUMNS[notebook]} <= metrics.keys()
    assert metrics["mode"] == "full"
    for label in ROWS[notebook]:
        assert readme_row(metrics, notebook, label) in README.splitlines()


def test_readme_says_what_a_run_costs_which_split_problem_2_used_and_links_to_what_exists():
    metrics = [read_metrics(ROOT, name) for name in NOTEBOOKS]
    assert " | ".join(["\n| minutes", *(f"{m['seconds_total'] / 60:.1f}" for m in metrics)]) + " |" in README
    without_label = [metrics[2][key] for key in ("vae_iwae_same_samples", "cvae_unlabelled_iwae")]
    row = "\n| the same without the label, 160 samples (C-VAE: 16 for each class) | {:.2f} | {:.2f} |"
    assert row.format(*without_label) in README
    names = "finetuned_shifts", "supervised_shifts"
    fine, scratch = ([metrics[0][f"{name}_draws"], *metrics[0][f"{name}_by_labels"].values()] for name in names)
    gains, wrong = np.subtract(fine, scratch), 2 - np.add(fine, scratch)
    errors = np.hypot(gains.std(1, ddof=1) / gains.shape[1] ** 0.5, (wrong.mean(1) / metrics[0]["n_test"]) ** 0.5)
    gains = 100 * np.c_[gains.mean(1), errors].ravel()
    assert "they add {:.2f} ± {:.2f} points with 10% of the labels, {:.2f} ± {:.2f} with 1%".format(*gains) in README
    text, v = " ".join(README.split()), metrics[2]
    assert metrics[1]["lower_error"] in text
    given = "in {swap_one_label_z_true_class:.0%}, given the true ones in {swap_true_label_z_true_class:.0%}"
    assert (given + " (VAE: {vae_z_knn:.0%})").format(**v) in text
    drawn = "from z in {swap_random_label_z_given:.0%}, the image's class in {swap_random_label_z_true_class:.0%}"
    assert drawn.format(**v) in text
    stand_in = {"default": False, "t10k-only 6:1": True}[metrics[1]["split"]]
    assert ("split 6 : 1 (see" in README) == stand_in
    assert ("Stand-in split" in outputs("hw5_rbm")[0]["data"]["text/html"]) == stand_in
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

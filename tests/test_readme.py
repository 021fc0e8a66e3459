"""The README states nothing that the metrics files do not."""

import json
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def columns(template, values):
    """Names of the metrics in a row."""
    return [template.format(value) for value in values]


def accuracies(method):
    """Names of the metrics in the row of one of problem 1's methods."""
    return columns(f"{method}_{{}}", ("train_accuracy_mean", "test_accuracy_mean", "test_accuracy_std"))


SIZES, MODELS = (16, 64, 256), ("vae", "cvae")
GAN, RBM, VAE = "hw5_gan", "hw5_rbm", "hw5_vae"
ROWS = {  # label: notebook, format, metrics of the row's columns
    "linear layer on the frozen discriminator": (GAN, "{:.2%}", accuracies("probe")),
    "linear layer on the same network as an autoencoder's encoder": (GAN, "{:.2%}", accuracies("probe_autoencoder")),
    "linear layer on the same network with random weights": (GAN, "{:.2%}", accuracies("probe_random")),
    "linear layer on pixels": (GAN, "{:.2%}", accuracies("probe_pixels")),
    "nearest neighbours in pixels": (GAN, "{:.2%}", accuracies("knn_pixels")),
    "all layers, from scratch": (GAN, "{:.2%}", accuracies("supervised")),
    "all layers, from the discriminator's weights": (GAN, "{:.2%}", accuracies("finetuned")),
    "all layers, from scratch, images shifted": (GAN, "{:.2%}", accuracies("supervised_shifts")),
    "all layers, from the discriminator's weights, images shifted": (GAN, "{:.2%}", accuracies("finetuned_shifts")),
    "reconstruction error, training images": (RBM, "{:.4f}", columns("m{}_mse_train", SIZES)),
    "reconstruction error, test images": (RBM, "{:.4f}", columns("m{}_mse_test", SIZES)),
    "PCA with M components, test images": (RBM, "{:.4f}", columns("m{}_pca_mse_test", SIZES)),
    "log-likelihood, CD-5 as assigned": (
        RBM,
        "{:.0f}",
        ["m16_loglik_test", *columns("m{}_loglik_test_ais", SIZES[1:])],
    ),
    "log-likelihood, CD-5, σ learned, centred": (
        RBM,
        "{:.0f}",
        [None, *columns("m{}_cd5_centred_loglik_test_ais", SIZES[1:])],
    ),
    "log-likelihood, persistent chains, σ learned, centred": (
        RBM,
        "{:.0f}",
        ["m16_persistent_loglik_test", *columns("m{}_persistent_loglik_test_ais", SIZES[1:])],
    ),
    "log-likelihood, probabilistic PCA with M factors": (RBM, "{:.0f}", columns("ppca{}_loglik_test", SIZES)),
    "negative ELBO": (VAE, "{:.2f}", columns("{}_test_nelbo", MODELS)),
    "importance-weighted bound": (VAE, "{:.2f}", columns("{}_test_iwae", MODELS)),
    "the same without the label": (VAE, "{:.2f}", ["vae_iwae_same_samples", "cvae_unlabelled_iwae"]),
    "nats about the class in z, at least": (VAE, "{:.2f}", columns("{}_class_information", MODELS)),
    "nearest neighbours of the same class": (VAE, "{:.1%}", columns("{}_same_class_neighbours", MODELS)),
    "class read from the mean μ by a linear probe": (VAE, "{:.1%}", columns("{}_mu_linear_probe", MODELS)),
    "class read from the mean μ by k-NN": (VAE, "{:.1%}", columns("{}_mu_knn", MODELS)),
}


@pytest.mark.parametrize("label", ROWS)
def test_results_at_a_glance_are_the_metrics(label):
    notebook, form, keys = ROWS[label]
    metrics = json.loads((ROOT / "figures" / f"{notebook}_metrics.json").read_text())
    numbers = [form.format(metrics[key]) if key else "–" for key in keys]
    assert " | ".join([f"\n| {label}", *numbers]) in README


def test_what_a_run_costs_is_the_metrics():
    metrics = [json.loads((ROOT / "figures" / f"{name}_metrics.json").read_text()) for name in (GAN, RBM, VAE)]
    assert " | ".join(["\n| minutes", *(f"{m['seconds_total'] / 60:.1f}" for m in metrics)]) + " |" in README


def test_it_says_which_split_problem_2_used():
    metrics = json.loads((ROOT / "figures" / "hw5_rbm_metrics.json").read_text())
    assert ("split 6 : 1 (see" in README) == (metrics["split"] == "t10k-only 6:1")


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

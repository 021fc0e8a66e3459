"""The README states nothing that the metrics files do not."""

import json
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PROBE = "{0}_test_accuracy_mean {0}_test_accuracy_std"
ROWS = {  # label: notebook, format, metrics of the row's columns
    "of the GAN's discriminator": ("hw5_gan", "{:.2%}", PROBE.format("probe")),
    "of the same network with random weights": ("hw5_gan", "{:.2%}", PROBE.format("probe_random")),
    "pixels": ("hw5_gan", "{:.2%}", PROBE.format("probe_pixels")),
    "none: the same layers trained end to end": ("hw5_gan", "{:.2%}", PROBE.format("supervised")),
    "reconstruction error, training images": ("hw5_rbm", "{:.4f}", "m16_mse_train m64_mse_train m256_mse_train"),
    "reconstruction error, test images": ("hw5_rbm", "{:.4f}", "m16_mse_test m64_mse_test m256_mse_test"),
    "PCA with M components, test images": (
        "hw5_rbm",
        "{:.4f}",
        "m16_pca_mse_test m64_pca_mse_test m256_pca_mse_test",
    ),
    "log-likelihood, test images (M = 16 exact, else AIS)": (
        "hw5_rbm",
        "{:.1f}",
        "m16_loglik_test m64_loglik_test_ais m256_loglik_test_ais",
    ),
    "log-likelihood of probabilistic PCA, test images": (
        "hw5_rbm",
        "{:.1f}",
        "ppca16_loglik_test ppca64_loglik_test ppca256_loglik_test",
    ),
    "negative ELBO": ("hw5_vae", "{:.2f}", "vae_test_nelbo cvae_test_nelbo"),
    "importance-weighted bound": ("hw5_vae", "{:.2f}", "vae_test_iwae cvae_test_iwae"),
    "class read from the mean μ by a linear probe": (
        "hw5_vae",
        "{:.1%}",
        "vae_mu_linear_probe cvae_mu_linear_probe",
    ),
    "class read from the mean μ by k-NN": ("hw5_vae", "{:.1%}", "vae_mu_knn cvae_mu_knn"),
}


@pytest.mark.parametrize("label", ROWS)
def test_results_at_a_glance_are_the_metrics(label):
    notebook, form, keys = ROWS[label]
    metrics = json.loads((ROOT / "figures" / f"{notebook}_metrics.json").read_text())
    assert " | ".join([f"\n| {label}", *(form.format(metrics[key]) for key in keys.split())]) in README


def test_it_says_which_split_problem_2_used():
    metrics = json.loads((ROOT / "figures" / "hw5_rbm_metrics.json").read_text())
    assert ("split 6 : 1 (see" in README) == (metrics["split"] == "t10k-only 6:1")


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

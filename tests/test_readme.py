"""The README states nothing that the metrics files do not."""

import json
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
ROWS = {  # label: notebook, format, metrics of the row's columns
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


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target

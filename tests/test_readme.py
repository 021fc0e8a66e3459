"""The README states nothing that the metrics files do not."""

import json
import re

from conftest import ROOT


def test_results_at_a_glance_are_the_metrics():
    readme = (ROOT / "README.md").read_text()
    m = json.loads((ROOT / "figures" / "hw5_vae_metrics.json").read_text())
    rows = {
        "negative ELBO": "{:.2f}|test_nelbo",
        "importance-weighted bound": "{:.2f}|test_iwae",
        "class read from the mean μ by a linear probe": "{:.1%}|mu_linear_probe",
        "class read from the mean μ by k-NN": "{:.1%}|mu_knn",
    }
    for label, value in rows.items():
        form, key = value.split("|")
        assert f"| {label} | {form.format(m[f'vae_{key}'])} | {form.format(m[f'cvae_{key}'])} |" in readme


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target

"""Whole notebooks: from the committed weights against the committed report, and on the demo data."""

import os
import re
from pathlib import Path

import pytest
from conftest import NOTEBOOKS, ROOT, read_metrics, read_notebook, run_notebook, top

QUICK = {  # parameters of a demo run that is as short as it can be
    "hw5_gan": dict(EPOCHS=2, RUNS=2, ABLATION_SEEDS=2, DRAWS=2, STEPS=10, RULER_STEPS=60, AUTOENCODER_EPOCHS=1)
    | dict(RATES=[2e-3], PENALTIES=[1e-2, 1.0], SHARES=[0.01]),
    "hw5_rbm": dict(EPOCHS=2, RUNS=2, AIS_STEPS=20, SWEEPS=20, CHAIN_LENGTH=20),
    "hw5_vae": dict(EPOCHS=10, RUNS=2, GAP_STEPS=5, IWAE_SAMPLES=20),
}
SPREAD = {"hw5_gan": "frechet_std", "hw5_rbm": "m16_mse_test_std", "hw5_vae": "cvae_test_nelbo_std"}
OF_THE_MACHINE = {"device", "training_precision", "versions", "seconds_total", "study_probe"}
NATS = 0.08  # tolerance of information that an MLP finds, which is stopped early
LOOSE = {  # tolerances of metrics that hang on the last bits of a sum, which differ between processors
    "obeyed|recognised": {"abs": 0.05},
    "information|marginal_kl|class_kl|rest_of_kl": {"abs": NATS},
    "linear_probe|_mlp": {"abs": 0.02},  # hardly regularised, stopped early
    "two_sample": {"abs": 0.03},  # of classifiers that are trained anew
    "_by_d$": {"abs": 0.02},  # shares of a thousand images in an order
    "variance": {"rel": 0.2},  # of long Gibbs chains
    "_shift$": {"abs": 0.05},  # likewise
}


def assert_close(metrics, expected):
    """Equal but for what describes the machine; numbers that are computed anew, up to a tolerance."""
    assert metrics.keys() == expected.keys()
    cut_short = {key for key in expected if "_map_" in key}  # of t-SNE, see run_notebook
    for key in expected.keys() - OF_THE_MACHINE - cut_short:
        within = next((LOOSE[parts] for parts in LOOSE if re.search(parts, key)), {"rel": 2e-3, "abs": 2e-3})
        if "_ais" in key:  # by its own stated error, at least by a nat
            within = {"abs": max(1, expected[f"{key.removesuffix('_se')}_se"])}
        anew = isinstance(expected[key], float) or key.endswith("_by_d")
        assert metrics[key] == (pytest.approx(expected[key], **within) if anew else expected[key]), key


NUMBER = r"(-?\d+(?:\.(\d+))?)%?(?: ± (\d+(?:\.\d+)?))?"


@pytest.mark.parametrize("name", NOTEBOOKS[::-1])  # the longest test of all comes first
def test_committed_metrics_answer_and_table_follow_from_the_committed_weights(name, tmp_path, monkeypatch):
    """On the committed run's files alone: with more of them, or a network, problem 2 takes another split."""
    folder, committed = Path(os.environ.get("HW5_DATA", ROOT / "data")).resolve(), read_metrics(ROOT, name)
    for dataset, file in (blob.split("/") for blob in committed["data_blobs"]):
        if not (path := folder / dataset / "raw" / file).exists():
            pytest.skip("needs the real data: set HW5_DATA to the folder that holds them")
        (raw := tmp_path / "data" / dataset / "raw").mkdir(parents=True, exist_ok=True)
        (raw / file).symlink_to(path)
    for protocol in "http", "https":
        monkeypatch.setenv(f"{protocol}_proxy", "http://127.0.0.1:9")
    executed = run_notebook(name, tmp_path, TRAIN=False, SAVED=str(ROOT), DATA=str(tmp_path / "data"))
    assert_close(read_metrics(tmp_path, name), committed)
    (answer, rows), (its_answer, its_rows) = top(executed), top(read_notebook(name))
    for text, expected in zip([answer, *rows], [its_answer, *its_rows], strict=True):
        assert re.sub(NUMBER, "", text) == re.sub(NUMBER, "", expected)
        for (here, *_), (there, digits, error) in zip(re.findall(NUMBER, text), re.findall(NUMBER, expected)):
            # Two units of the last digit; with two of them it may be what an MLP finds.
            within = max(float(error or 0), 2 * 10 ** -len(digits), NATS if len(digits) == 2 else 0)
            assert float(here) == pytest.approx(float(there), rel=2e-3, abs=within), text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_demo_run_says_so_and_writes_only_under_demo(name, tmp_path):
    executed = run_notebook(name, tmp_path, **QUICK[name])
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    top = "".join(output["data"].get("text/html", "") for output in executed.cells[1].outputs)
    assert ">DEMO" in top
    assert "<table" in top
    metrics = read_metrics(tmp_path / "demo", name)
    assert (metrics["mode"], metrics["split"], metrics["data_blobs"]) == ("demo", "demo", {})
    assert {path.name for path in tmp_path.iterdir()} == {"demo", f"{name}.ipynb"}
    assert metrics[SPREAD[name]] > 0, "the trainings are one and the same"

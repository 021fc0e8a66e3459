"""Whole notebooks: on the demo data, from saved weights, and against the committed report."""

import json

import pytest
from conftest import NOTEBOOKS, ROOT, read_metrics, run_notebook

QUICK = {  # parameters of a demo run that is as short as it can be
    "hw5_gan": {"EPOCHS": 2, "RUNS": 2, "DRAWS": 2, "STEPS": 10, "RULER_STEPS": 60, "AUTOENCODER_EPOCHS": 1},
    "hw5_rbm": {"EPOCHS": 2, "RUNS": 2, "AIS_STEPS": 20, "SWEEPS": 20, "CHAIN_LENGTH": 20},
    "hw5_vae": {"EPOCHS": 10, "RUNS": 2, "GAP_STEPS": 5, "IWAE_SAMPLES": 20},
}
OF_THE_MACHINE = {"device", "training_precision", "versions", "seconds_total"}


# Tests of one demo run stay in one of the parallel processes.
@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in NOTEBOOKS])
def demo(request, tmp_path_factory):
    """A notebook run on the demo data: its name, its folder, the executed notebook."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, run_notebook(request.param, folder, **QUICK[request.param])


def tolerance(key, expected, beside, rel):
    """How far a float may be from the expected one; beside: the metrics it stands among.

    What t-SNE, small classifiers, annealed sampling and long Gibbs chains give depends on the last bits of a sum,
    which differ between processors. An annealed estimate may be off by its own stated error, at least a nat.
    """
    if key.endswith(("_ais", "_ais_se")):
        return {"abs": max(1, beside.get(key if key.endswith("_se") else f"{key}_se", 0.03 * abs(expected)))}
    if "map" in key or "_ais" in key:
        return {"rel": 0.05, "abs": 0.03}
    if any(part in key for part in ("obeyed", "recognised", "mlp", "information", "class_kl", "rest_of_kl")):
        return {"abs": 0.2 if "by_class" in key else 0.05}  # of small classifiers trained anew
    if key.endswith("_by_d"):
        return {"abs": 0.02}  # shares of a thousand images, in an order that hangs on the last bits
    if "variance" in key or "two_draws" in key:
        return {"rel": 0.2}
    return {"rel": rel, "abs": rel}


def assert_close(metrics, expected, rel):
    """All metrics are equal, floats up to a tolerance, but for those that describe the run and the machine."""
    assert metrics.keys() == expected.keys()
    for key in expected.keys() - OF_THE_MACHINE:
        assert_equal(metrics[key], expected[key], rel, key, tolerance(key, expected[key], expected, rel))


def assert_equal(value, expected, rel, key, within):
    """One metric, all that is nested in it. Floats may differ within a tolerance."""
    if isinstance(expected, dict):
        assert_close(value, expected, rel)
    elif isinstance(expected, list):
        for one, other in zip(value, expected, strict=True):
            assert_equal(one, other, rel, key, within)
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, **within), key
    else:
        assert value == expected, key


def outputs_of(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_demo_run_says_so_and_writes_only_under_demo(demo):
    name, folder, executed = demo
    results = "".join(output["data"].get("text/html", "") for output in executed.cells[1].outputs)
    assert "DEMO RUN" in results
    assert "<table" in results
    metrics = read_metrics(folder / "demo", name)
    assert (metrics["mode"], metrics["split"], metrics["data_blobs"]) == ("demo", "demo", {})
    written = [path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()]
    assert set(written) == {"demo", f"{name}.ipynb"}
    left = [path for path in (folder / "demo" / "state").rglob("*") if path.is_file()]
    assert not left, "a finished run leaves nothing to resume"
    assert not [output for output in outputs_of(executed) if output.get("name") == "stderr"]


def test_saved_weights_re_render_the_same_numbers(demo, tmp_path):
    name, folder, _ = demo
    run_notebook(name, tmp_path, TRAIN=False, SAVED=str(folder / "demo"), **QUICK[name])
    again, first = read_metrics(tmp_path / "demo", name), read_metrics(folder / "demo", name)
    assert_close(again, first, rel=1e-5)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_metrics_follow_from_the_committed_weights(name, tmp_path, real_data):
    """The notebooks with TRAIN = False on the real data give the committed metrics again."""
    run_notebook(name, tmp_path, TRAIN=False, SAVED=str(ROOT), DATA=real_data)
    assert_close(read_metrics(tmp_path, name), read_metrics(ROOT, name), rel=2e-3)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_metrics_file_is_complete_and_plain(name):
    metrics = json.loads((ROOT / "figures" / f"{name}_metrics.json").read_text())
    assert {"mode", "split", "data_blobs"} | OF_THE_MACHINE | REQUIRED[name] <= metrics.keys()
    assert metrics["mode"] == "full"
    assert metrics["data_blobs"]


REQUIRED = {
    "hw5_gan": {
        f"{method}_{part}_accuracy_{statistic}"
        for method in ("probe", "probe_random", "probe_pixels", "probe_autoencoder", "knn_pixels")
        for part in ("train", "val", "test")
        for statistic in ("mean", "std")
    }
    | {
        f"{m}{s}_test_accuracy_{k}"
        for m in ("supervised", "finetuned")
        for s in ("", "_shifts")
        for k in ("mean", "std")
    }
    | {
        "frechet_test",
        "frechet_floor",
        "confident_share",
        "digit_share_min",
        "digit_share_max",
        "density",
        "coverage",
    }
    | {"two_sample_accuracy", "two_sample_accuracy_floor", "epochs", "runs"},
    "hw5_rbm": {f"m{M}_{key}" for M in (16, 64, 256) for key in ("mse_train", "mse_test", "mse_test_std")}
    | {f"m{M}_{key}" for M in (16, 64, 256) for key in ("bits_mse_test", "mse_test_gibbs5", "pca_mse_test")}
    | {f"m{M}_{key}loglik_test_ais{se}" for M in (64, 256) for key in ("", "persistent_") for se in ("", "_se")}
    | {f"m16_{key}loglik_test{se}" for key in ("", "cd5_learned_", "exact_fixed_") for se in ("", "_se")}
    | {f"m16_exact_learned_{key}" for key in ("loglik_test", "loglik_test_se", "mse_test")}
    | {f"ppca{M}_loglik_test" for M in (16, 64, 256)}
    | {"gaussian_loglik_test", "updates", "runs"},
    "hw5_vae": {"pixel_entropy_floor"}
    | {f"{m}_{s}_{k}" for m in ("vae", "cvae") for s in ("train", "val", "test") for k in ("nelbo", "bce", "kl")}
    | {f"{m}_test_{k}_std" for m in ("vae", "cvae") for k in ("nelbo", "bce", "kl", "iwae")}
    | {f"{m}_{key}" for m in ("vae", "cvae") for key in ("test_iwae", "epochs", "silhouette", "map_knn")}
    | {f"{m}_{of}_{key}" for m in ("vae", "cvae") for of in ("mu", "z") for key in ("linear_probe", "qda", "knn")}
    | {
        f"{m}_{key}"
        for m in ("vae", "cvae")
        for key in ("class_information", "same_class_neighbours", "aggregate_kl")
    }
    | {f"{m}_{key}_gap" for m in ("vae", "cvae") for key in ("amortisation", "covariance")}
    | {"cvae_unlabelled_iwae", "vae_iwae_same_samples", "unlabelled_difference", "unlabelled_difference_se"}
    | {"swap_wrong_label_true_class", "swap_random_label_given", "swap_random_label_true_class"}
    | {"cvae_generative_accuracy", "runs"},
}

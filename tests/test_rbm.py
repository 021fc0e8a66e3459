"""The RBM notebook's definitions, against enumeration, sampling, autograd and numpy."""

import itertools
import json
import math
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import FAULTS, ROOT, fake_gpu, kill_in_training, load_definitions, note_fault, refused
from sklearn.decomposition import PCA
from test_data import FILES, idx_files, no_network, place, publish

M = 6
HIDDEN = torch.tensor(list(itertools.product([0.0, 1.0], repeat=M)))
EPOCHS = 40


def small_problem(out, **parameters):
    """Definitions with a few structured images in place: bright bars whose number varies."""
    x = torch.rand(300, 28, 1, generator=torch.Generator().manual_seed(1)).round().expand(300, 28, 28).flatten(1)
    images = {"x_train": x[:260], "x_test": x[260:], "split": "demo"}
    data = SimpleNamespace(blobs={}, mode="demo")
    return load_definitions("hw5_rbm", OUT=str(out), AIS_STEPS=200, data=data, **images, **parameters)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    return small_problem(tmp_path_factory.mktemp("out"))


@pytest.fixture
def rbm(notebook):
    """A small RBM with random parameters on which every term matters."""
    model = notebook["GBRBM"](M, b=torch.rand(784), sigma=0.3 + torch.rand(784), learn_sigma="vector")
    with torch.no_grad():
        model.W.normal_(0, 0.05)
        model.alpha.normal_()
    return model


def energy(rbm, v, h):
    """The assignment's energy. v: (784,); h: (n, M). Returns (n,)."""
    sigma = torch.exp(rbm.log_sigma)
    coupling = torch.einsum("ji,nj,i->n", rbm.W, h, v / sigma)
    return -(coupling - ((v - rbm.b) ** 2 / (2 * sigma**2)).sum() + h @ rbm.alpha)


def test_start_is_the_templates(notebook):
    rbm = notebook["GBRBM"](256)
    shapes = {"W": (256, 784), "b": (784,), "alpha": (256,), "log_sigma": (784,)}
    assert {key: tuple(value.shape) for key, value in rbm.state_dict().items()} == shapes
    assert rbm.W.std().item() == pytest.approx(0.01, rel=0.01)
    assert not rbm.alpha.any()
    assert not rbm.b.any()
    assert (notebook["BATCH"], notebook["CD_STEPS"], notebook["SIZES"]) == (128, 5, (16, 64, 256))


def test_free_energy_and_hidden_conditional_by_enumeration(rbm):
    v = torch.rand(784)
    with torch.no_grad():
        log_weights = -energy(rbm, v, HIDDEN)
        torch.testing.assert_close(rbm.free_energy(v[None])[0], -torch.logsumexp(log_weights, 0))
        expected = torch.softmax(log_weights, 0) @ HIDDEN
        torch.testing.assert_close(torch.sigmoid(rbm.hidden_input(v[None])[0]), expected, atol=1e-5, rtol=1e-4)


def test_visible_mean_is_where_the_energy_is_least(rbm):
    """The conditional density is a Gaussian, so its mean is its mode: the energy's gradient in v vanishes there."""
    for h in HIDDEN[[0, 5, 63]]:
        v = rbm.visible_mean(h[None])[0].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(rbm, v, h[None]).sum(), v)
        torch.testing.assert_close(gradient, torch.zeros(784), atol=2e-4, rtol=0)


def test_one_gibbs_step_samples_both_conditionals(rbm):
    """From one image: v's mean and variance over many steps are those of the mixture over h."""
    v = torch.rand(784)
    with torch.no_grad():
        p = torch.softmax(-energy(rbm, v, HIDDEN), 0)
        means = rbm.visible_mean(HIDDEN)
        mean = p @ means
        variance = p @ (means - mean).square() + torch.exp(2 * rbm.log_sigma)
    drawn = rbm.gibbs(v.expand(20000, -1), 1)
    z = (drawn.mean(0) - mean) / (variance / len(drawn)).sqrt()
    assert z.square().mean().item() == pytest.approx(1, abs=0.4)  # the 784 deviations share the draws of h
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.06, atol=0)


def test_chain_has_five_steps_and_passes_no_gradient(notebook, rbm, monkeypatch):
    calls, hidden_input = [], rbm.hidden_input
    monkeypatch.setattr(rbm, "hidden_input", lambda v: calls.append(torch.is_grad_enabled()) or hidden_input(v))
    notebook["cd_loss"](rbm, torch.rand(8, 784))
    assert sorted(calls) == [False] * 5 + [True] * 2  # five alternations without gradient, two free energies
    assert not rbm.gibbs(torch.rand(8, 784), 5).requires_grad


def test_gradient_is_the_positive_minus_the_negative_phase(notebook, rbm):
    """By hand, equation (9) of derivations.md, at the data and at the end of the very chain that was run."""
    v, ends, gibbs = torch.rand(16, 784), [], rbm.gibbs
    rbm.gibbs = lambda v, k: ends.append(gibbs(v, k)) or ends[-1]
    notebook["cd_loss"](rbm, v).backward()
    W, b, sigma = rbm.W.detach(), rbm.b.detach(), torch.exp(rbm.log_sigma).detach()

    def phase(v):
        h = torch.sigmoid(rbm.hidden_input(v)).detach()
        return {
            "W": h.T @ (v / sigma) / len(v),
            "b": ((v - b) / sigma**2).mean(0),
            "alpha": h.mean(0),
            "log_sigma": ((v - b) ** 2 / sigma**2 - v / sigma * (h @ W)).mean(0),
        }

    positive, negative = phase(v), phase(ends[0])
    for name, parameter in rbm.named_parameters():
        torch.testing.assert_close(-parameter.grad, positive[name] - negative[name], rtol=1e-3, atol=1e-4)


def test_exact_log_z_by_brute_force(notebook, rbm):
    """v integrated out of exp(-E) numerically, pixel by pixel, for every hidden state."""
    W, b, alpha, log_sigma = (p.detach().double() for p in (rbm.W, rbm.b, rbm.alpha, rbm.log_sigma))
    sigma, offsets = torch.exp(log_sigma), torch.linspace(-9, 9, 361, dtype=torch.float64)[:, None]
    v, terms = b + sigma * offsets, []
    for h in HIDDEN.double():
        exponent = v / sigma * (h @ W) - (v - b) ** 2 / (2 * sigma**2)
        integrals = torch.logsumexp(exponent, 0) + torch.log(sigma * (offsets[1] - offsets[0]))
        terms.append(integrals.sum() + h @ alpha)
    assert notebook["exact_log_z"](rbm) == pytest.approx(torch.logsumexp(torch.stack(terms), 0).item(), abs=1e-6)


@pytest.mark.parametrize("start", [None, 0.9])
def test_ais_agrees_with_the_exact_value_and_knows_its_error(notebook, rbm, start):
    with torch.no_grad():
        rbm.W *= 3
    start = start and torch.full((M,), start)
    runs = [notebook["ais_log_z"](rbm, 60, start, seed) for seed in range(30)]
    estimates, errors, sizes = map(np.array, zip(*runs))
    assert np.std(estimates) == pytest.approx(errors.mean(), rel=0.5)
    assert estimates.mean() == pytest.approx(notebook["exact_log_z"](rbm), abs=4 * errors.mean() / math.sqrt(30))
    assert 0 < errors.mean() < 0.2
    assert ((sizes > 1) & (sizes <= notebook["AIS_CHAINS"])).all()


def test_log_likelihood_is_that_of_the_mixture_over_hidden_states(notebook, rbm):
    x = torch.randint(0, 256, (20, 784)).float() / 255
    v = notebook["dequantise"](x).double()
    W, b, alpha, sigma = (p.detach().double() for p in (rbm.W, rbm.b, rbm.alpha, torch.exp(rbm.log_sigma)))
    h = HIDDEN.double()
    log_p_h = torch.log_softmax(h @ alpha + h @ W @ (b / sigma) + 0.5 * (h @ W).square().sum(1), 0)
    means = b + sigma * (h @ W)
    log_p = torch.distributions.Normal(means[:, None], sigma).log_prob(v).sum(2) + log_p_h[:, None]
    row = notebook["evaluate"](rbm, {"test": x})
    assert row["loglik_test"] == pytest.approx(torch.logsumexp(log_p, 0).mean().item(), rel=1e-5)


def test_errors_by_plain_numpy(notebook, rbm):
    v = torch.rand(50, 784)
    W, b, alpha = (p.detach().numpy().astype(float) for p in (rbm.W, rbm.b, rbm.alpha))
    sigma, x = np.exp(rbm.log_sigma.detach().numpy().astype(float)), v.numpy().astype(float)
    hidden = 1 / (1 + np.exp(-(alpha + (x / sigma) @ W.T)))
    expected = np.mean((x - (b + sigma * (hidden @ W))) ** 2)
    assert notebook["mean_squared_error"](v, rbm.reconstruct(v)) == pytest.approx(expected, rel=1e-5)
    assert notebook["evaluate"](rbm, {"any": v})["mse_any"] == pytest.approx(expected, rel=1e-5)

    train = notebook["x_train"].numpy().astype(float)
    row = notebook["reconstruction_errors"](rbm, PCA(4, svd_solver="full").fit(notebook["x_train"].numpy()))
    vectors = np.linalg.svd(train - train.mean(0), full_matrices=False)[2][:4]
    residual = (train - train.mean(0)) - (train - train.mean(0)) @ vectors.T @ vectors
    assert row["pca_mse_train"] == pytest.approx(np.mean(residual**2), rel=1e-4)
    assert row["mse_test_gibbs5"] > row["mse_test"]


def test_ppca_is_the_gaussian_with_its_covariance(notebook):
    train = torch.randn(3000, 3) @ torch.randn(3, 12) + torch.randn(3000, 12)
    value = notebook["ppca_log_likelihood"](train, train, 3)
    pca = PCA(3, svd_solver="full").fit(train.double().numpy())
    assert value == pytest.approx(pca.score(train.double().numpy()), rel=1e-9)
    floored = notebook["ppca_log_likelihood"](train * 0.01, train * 0.01, 3)
    best = torch.distributions.Normal(0.0, notebook["SIGMA_MIN"]).log_prob(torch.zeros(12)).sum().item()
    assert floored < best, "no density above the floor's"


def test_dequantised_pixels_keep_their_grey_level(notebook):
    x = torch.randint(0, 256, (20, 784)).float() / 255
    noisy = notebook["dequantise"](x)
    assert torch.equal((noisy * 256).floor(), (x * 255).round())
    assert torch.equal(noisy, notebook["dequantise"](x))


def test_sigma_has_a_floor_and_one_sigma_stays_one(notebook):
    model = notebook["GBRBM"](4, b=0.5, sigma=notebook["SIGMA_MIN"] * 1.0005, learn_sigma="scalar")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for _ in range(5):
        notebook["train_step"](model, optimizer, torch.full((64, 784), 0.5))
    assert model.log_sigma.min().item() >= math.log(notebook["SIGMA_MIN"]) - 1e-6
    assert model.log_sigma.max().item() == pytest.approx(model.log_sigma.min().item())
    assert notebook["spread"](0.01).min() >= notebook["SIGMA_MIN"]


def test_every_alternative_starts_and_learns(notebook):
    v = notebook["x_train"][:64]
    for start in notebook["ALTERNATIVES"].values():
        model = notebook["GBRBM"](4, *start)
        before = model.W.detach().clone()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
        notebook["train_step"](model, optimizer, v)
        assert not torch.equal(model.W, before)
        assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in model.parameters())


def test_chain_pictures_go_on_from_one_another(notebook, rbm, monkeypatch):
    steps = []
    monkeypatch.setattr(rbm, "gibbs", lambda v, k: steps.append(k) or v)
    assert len(notebook["chain_pictures"](rbm, torch.rand(3, 784))) == 3 * len(notebook["CHAIN_STEPS"])
    assert list(itertools.accumulate(steps)) == list(notebook["CHAIN_STEPS"])


def data_cell():
    """Source of the cell that loads and arranges the data."""
    found = nbformat.read(ROOT / "hw5_rbm.ipynb", as_version=4).cells
    return next(c.source for c in found if c.cell_type == "code" and 'load_data("KMNIST"' in c.source)


def load_synthetic(tmp_path, monkeypatch, missing=()):
    """Run the data cell on synthetic files of the true size and header, without a network."""
    notebook = small_problem(tmp_path / "out", DATA=str(tmp_path / "data"))
    files = idx_files(60000, 10000)
    publish(notebook, "KMNIST", files)
    place(notebook, "KMNIST", {name: content for name, content in files.items() if name not in missing})
    no_network(notebook, monkeypatch)
    exec(data_cell(), notebook)
    return notebook


def title_of_a_figure(notebook):
    fig = plt.figure()
    notebook["show"](fig, "any", "Title")
    return fig.get_suptitle()


def test_default_split_has_469_updates_an_epoch(tmp_path, monkeypatch):
    notebook = load_synthetic(tmp_path, monkeypatch)
    metrics = notebook["METRICS"]
    assert (metrics["split"], metrics["n_train"], metrics["n_test"]) == ("default", 60000, 10000)
    assert (metrics["mode"], metrics["updates"], len(metrics["data_blobs"])) == ("full", 25 * 469, 4)
    assert notebook["passes_per_epoch"](60000, "full") == 1
    assert 0 <= notebook["x_train"].min() < notebook["x_train"].max() <= 1
    assert title_of_a_figure(notebook) == "Title"
    assert notebook["BANNER"] == ""


def test_stand_in_split_is_stratified_and_labelled_everywhere(tmp_path, monkeypatch, capsys):
    notebook = load_synthetic(tmp_path, monkeypatch, missing=FILES[:1])
    metrics = notebook["METRICS"]
    assert (metrics["split"], metrics["n_train"], metrics["n_test"]) == ("t10k-only 6:1", 8572, 1428)
    assert (metrics["mode"], metrics["updates"]) == ("full", 25 * 469)
    assert set(metrics["data_blobs"]) == {f"KMNIST/{name}" for name in FILES[2:]}
    assert title_of_a_figure(notebook) == "[10,000 test images split 6:1] Title"
    assert "Stand-in split" in notebook["BANNER"]
    y = notebook["data"].y_test
    train, test = notebook["stand_in_split"](notebook["data"].x_test, y)
    assert sorted([*train, *test]) == list(range(10000))
    counts = torch.bincount(y[test]) / torch.bincount(y)
    torch.testing.assert_close(counts, torch.full((10,), 1428 / 10000), atol=1e-3, rtol=0)


def test_committed_report_says_which_split_it_is():
    metrics = json.loads((ROOT / "figures" / "hw5_rbm_metrics.json").read_text())
    found = nbformat.read(ROOT / "hw5_rbm.ipynb", as_version=4).cells
    results = next(c for c in found if c.cell_type == "code").outputs[0]["data"]["text/html"]
    assert ("Stand-in split" in results) == (metrics["split"] == "t10k-only 6:1")
    assert metrics["split"] in ("default", "t10k-only 6:1")


def fit_small(out):
    """Train a small RBM in `out`; returns its weights and history."""
    notebook = small_problem(out)
    parts = {"train": notebook["x_train"], "test": notebook["x_test"]}
    rbm, history = notebook["fit"]("toy", (8, 0.5, 0.5), parts, EPOCHS)
    return rbm.state_dict(), history


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][key], b[0][key]) for key in a[0])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit_small(tmp_path_factory.mktemp("uninterrupted"))


def test_training_learns(uninterrupted):
    history = uninterrupted[1]
    assert history[-1]["mse_test"] < 0.99 * history[0]["mse_test"]


def test_two_runs_give_the_same_numbers(uninterrupted, tmp_path):
    assert same(fit_small(tmp_path), uninterrupted)


def test_a_killed_run_resumes_to_the_same_numbers(uninterrupted, tmp_path):
    assert 1 <= kill_in_training("test_rbm", tmp_path, "toy") < EPOCHS
    assert same(fit_small(tmp_path), uninterrupted)
    FAULTS["SIGKILL in training (RBM)"] = "the next run goes on where it was, to the same numbers"


ON_A_BAD_DISK = """
import subprocess, sys, torch
from test_rbm import fit_small
disk, result, *make_good = sys.argv[1:]
try:
    fit_small(disk)
except OSError as error:
    print(error)
subprocess.run(make_good, check=True)
torch.save(fit_small(disk), result)
"""


@pytest.mark.parametrize(
    ("options", "fault", "cause", "resumed"),
    [
        ("size=150k", "disk full, a real one (RBM)", "No space left on device", True),
        ("ro", "disk read-only, a real one (RBM)", "Read-only file system", False),
    ],
)
def test_a_run_on_a_bad_disk_ends_as_if_it_had_been_good(uninterrupted, tmp_path, options, fault, cause, resumed):
    """On a disk of its own, with room for the state of one epoch but not for two, or one that is read-only."""
    namespace = ["unshare", "--mount", "--map-root-user"]
    disk, result = tmp_path / "disk", tmp_path / "result.pt"
    disk.mkdir()
    mount = f"mount -t tmpfs -o {options} tmpfs {disk}"
    # The options that the kernel lists name the user outside the namespace, so they are not given again.
    make_good = f"mount --options-mode ignore -o remount,rw,size=100m tmpfs {disk}"
    trial = [*namespace, "sh", "-c", f"{mount} && {make_good}"]
    if not shutil.which("unshare") or subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("this machine does not let its users mount a disk in a namespace")
    python = shlex.join([sys.executable, "-c", ON_A_BAD_DISK, str(disk), str(result), *make_good.split()])
    command, folder = [*namespace, "sh", "-ec", f"{mount}\n{python}"], ROOT / "tests"
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    answer = next(line for line in said.splitlines() if line.startswith("cannot write"))
    assert cause in answer
    assert ("goes on from" in said) == resumed
    assert same(torch.load(result, weights_only=True), uninterrupted)
    note_fault(fault, answer)


def test_divergence_stops_with_a_message_and_keeps_the_last_state(tmp_path):
    notebook, calls = small_problem(tmp_path), []
    step, parts = notebook["train_step"], {"train": notebook["x_train"]}

    def poisoned(rbm, optimizer, v):
        calls.append(1)
        step(rbm, optimizer, v * (math.nan if len(calls) > 6 else 1))

    notebook["train_step"] = poisoned
    with refused(
        "training diverges (RBM)", FloatingPointError, r"toy: training broke down in epoch 3; .*epoch 2 is kept"
    ):
        notebook["fit"]("toy", (8, 0.5, 0.5), parts, 5)
    assert len(notebook["load_state"](tmp_path / "state" / "toy.pt")["history"]) == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_everything_stays_on_a_gpu(tmp_path, precision):
    """What is trained and what is measured, but for the backward pass, which fake tensors cannot do here."""
    notebook = small_problem(tmp_path, PRECISION=precision)
    with fake_gpu() as rules:
        cuda = rules.device
        notebook.update(DEVICE=cuda, CHAIN_STEPS=(0, 1, 2))
        v = torch.zeros(128, 784, device=cuda)
        with cuda:
            rbm = notebook["GBRBM"](16, torch.zeros(784), torch.ones(784))
        with notebook["autocast"]():
            assert notebook["cd_loss"](rbm, v).device.type == "cuda"
        assert rbm.gibbs(v, 2).dtype == torch.float32
        assert rbm.reconstruct(v).device.type == "cuda"
        assert notebook["chain_pictures"](rbm, v[:2]).device.type == "cuda"
        assert {part.device.type for part in notebook["hidden_model"](rbm)} == {"cpu"}
        assert notebook["evaluate"](rbm, {"train": v}).keys() == {"mse_train", "loglik_train"}
        notebook.update(x_train=v, x_test=v, AIS_STEPS=2)
        pca = SimpleNamespace(transform=lambda x: x, inverse_transform=lambda x: x)
        assert notebook["reconstruction_errors"](rbm, pca)["mse_test_gibbs5"] == 1
        assert notebook["ais_log_likelihoods"](rbm)["loglik_test_ais"] == -2
        with pytest.raises(RuntimeError, match="device"):
            notebook["cd_loss"](rbm, v.to("cpu"))


@pytest.mark.parametrize("learn_sigma", [False, "scalar", "vector"])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_no_step_of_training_waits_for_a_copy(tmp_path, learn_sigma):
    notebook = small_problem(tmp_path)
    with fake_gpu() as rules:
        notebook["DEVICE"] = rules.device
        with rules.device:
            rbm = notebook["GBRBM"](16, torch.zeros(784), torch.ones(784), learn_sigma)
        optimizer = torch.optim.Adam([p for p in rbm.parameters() if p.requires_grad], fused=True)
        x, before = torch.zeros(300, 784, device=rules.device), rules.copies
        notebook["train_epoch"](rbm, optimizer, x)
    assert rules.copies == before

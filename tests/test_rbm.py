"""The RBM notebook's definitions, against enumeration, sampling, autograd and numpy."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, UNREACHABLE, fake_gpu, kill_in_training, load_module
from sklearn.decomposition import PCA
from test_shared import FILES, idx_files, publish

M, D = 6, 784
HIDDEN = torch.tensor(list(itertools.product([0.0, 1.0], repeat=M)))
EPOCHS = 40


def small_problem(out):
    """Definitions with a few structured images in place: bright bars whose number varies."""
    nb = load_module("hw5_rbm", OUT=str(out), EPOCHS=EPOCHS, AIS_STEPS=200)
    x = torch.rand(300, 28, 1, generator=torch.Generator().manual_seed(1)).round().expand(300, 28, 28).flatten(1)
    nb.data = SimpleNamespace(x_train=x[:260], x_test=x[260:], split="demo", label="", blobs={}, out=Path(out))
    nb.x_train, nb.x_test, nb.passes = x[:260], x[260:], 1
    nb.mean_image, nb.spread = nb.x_train.mean(0), nb.x_train.std(0).clamp(min=nb.SIGMA_MIN)
    return nb


@pytest.fixture(scope="module")
def nb(tmp_path_factory):
    return small_problem(tmp_path_factory.mktemp("out"))


@pytest.fixture
def rbm(nb):
    """A small RBM with random parameters on which every term matters."""
    model = nb.GBRBM(M, torch.rand(D), 0.3 + torch.rand(D), learn_sigma=True)
    with torch.no_grad():
        model.W.normal_(0, 0.05)
        model.alpha.normal_()
    return model


def energy(rbm, v, h):
    """The assignment's energy. v: (784,); h: (n, M). Returns (n,)."""
    sigma = torch.exp(rbm.log_sigma)
    coupling = torch.einsum("ji,nj,i->n", rbm.W, h, v / sigma)
    return -(coupling - ((v - rbm.b) ** 2 / (2 * sigma**2)).sum() + h @ rbm.alpha)


# The model


def test_start_is_the_templates_and_the_rules(nb):
    rbm = nb.new_rbm(256, seed=0)
    shapes = {"W": (256, D), "b": (D,), "alpha": (256,), "log_sigma": (D,)}
    assert {key: tuple(value.shape) for key, value in rbm.state_dict().items()} == shapes
    assert rbm.W.std().item() == pytest.approx(0.01, rel=0.01)
    assert not rbm.alpha.any()
    assert torch.equal(rbm.b, nb.mean_image)
    torch.testing.assert_close(torch.exp(rbm.log_sigma), nb.x_train.std(0).clamp(min=0.1))
    assert not rbm.log_sigma.requires_grad
    assert (nb.BATCH, nb.CD_STEPS, nb.SIZES, nb.LEARNING_RATE) == (128, 5, (16, 64, 256), 1e-3)
    assert torch.equal(rbm.W, nb.new_rbm(256, seed=0, learn_sigma=True).W), "the same start"


def test_free_energy_and_hidden_conditional_by_enumeration(rbm):
    v = torch.rand(D)
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
        torch.testing.assert_close(gradient, torch.zeros(D), atol=2e-4, rtol=0)


def test_one_gibbs_step_samples_both_conditionals(rbm):
    """From one image: v's mean and variance over many steps are those of the mixture over h."""
    v = torch.rand(D)
    with torch.no_grad():
        p = torch.softmax(-energy(rbm, v, HIDDEN), 0)
        means = rbm.visible_mean(HIDDEN)
        mean = p @ means
        variance = p @ (means - mean).square() + torch.exp(2 * rbm.log_sigma)
    drawn = rbm.gibbs(v.expand(20000, -1), 1)
    z = (drawn.mean(0) - mean) / (variance / len(drawn)).sqrt()
    assert z.square().mean().item() == pytest.approx(1, abs=0.4)  # the 784 deviations share the draws of h
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.06, atol=0)


def test_translating_the_images_leaves_the_density_as_it_is(nb, rbm):
    v, origin = torch.rand(5, D), torch.rand(D)
    before, log_z = rbm.free_energy(v), nb.exact_log_z(rbm)
    nb.translate(rbm, origin)
    torch.testing.assert_close(rbm.free_energy(v - origin), before)
    torch.testing.assert_close(nb.exact_log_z(rbm), log_z)
    nb.translate(rbm, -origin)
    torch.testing.assert_close(rbm.free_energy(v), before)


# The negative phases


def test_chain_has_five_steps_and_passes_no_gradient(nb, rbm, monkeypatch):
    calls, hidden_input = [], rbm.hidden_input
    monkeypatch.setattr(rbm, "hidden_input", lambda v: calls.append(torch.is_grad_enabled()) or hidden_input(v))
    nb.cd5(rbm, torch.rand(8, D))
    assert sorted(calls) == [False] * 5 + [True]  # five alternations without gradient, one free energy
    assert not rbm.gibbs(torch.rand(8, D), 5).requires_grad


def test_cd_is_the_positive_minus_the_negative_phase(nb, rbm):
    """By hand, equation (9) of derivations.md, at the data and at the end of the very chain that was run."""
    v, ends, gibbs = torch.rand(16, D), [], rbm.gibbs
    rbm.gibbs = lambda v, k: ends.append(gibbs(v, k)) or ends[-1]
    found = nb.direction(rbm, nb.cd5, v)
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
    assert found.keys() == positive.keys()
    for name, gradient in found.items():
        expected = (positive[name] - negative[name]).flatten()
        torch.testing.assert_close(-gradient, expected, rtol=1e-3, atol=1e-4)


def moments(rbm):
    """E[h] and E[h h^T] under p(h), from the energy with v integrated out numerically; float64."""
    W, b, alpha, log_sigma = (p.detach().double() for p in (rbm.W, rbm.b, rbm.alpha, rbm.log_sigma))
    log_weights = log_integrals(W, b, alpha, torch.exp(log_sigma))
    p, h = torch.softmax(log_weights, 0), HIDDEN.double()
    return p @ h, torch.einsum("n,nj,nk->jk", p, h, h)


def log_integrals(W, b, alpha, sigma):
    """log of the integral of exp(-E(v, h)) over v, pixel by pixel on a grid, for every hidden state: (2^M,)."""
    offsets = torch.linspace(-9, 9, 361, dtype=torch.float64)[:, None]
    v, terms = b + sigma * offsets, []
    for h in HIDDEN.double():
        exponent = v / sigma * (h @ W) - (v - b) ** 2 / (2 * sigma**2)
        integrals = torch.logsumexp(exponent, 0) + torch.log(sigma * (offsets[1] - offsets[0]))
        terms.append(integrals.sum() + h @ alpha)
    return torch.stack(terms)


def test_log_f_and_log_z_by_brute_force(nb, rbm):
    """v integrated out of exp(-E) numerically, pixel by pixel, for every hidden state."""
    parameters = (p.detach().double() for p in (rbm.W, rbm.b, rbm.alpha, torch.exp(rbm.log_sigma)))
    expected = log_integrals(*parameters)
    with torch.no_grad():
        torch.testing.assert_close(nb.log_f(rbm, HIDDEN).double(), expected, rtol=1e-6, atol=1e-3)
        assert nb.exact_log_z(rbm).item() == pytest.approx(torch.logsumexp(expected, 0).item(), abs=1e-3)


def test_exact_gradient_is_that_of_the_moments(nb, rbm):
    """Equation (14) of derivations.md, with moments from numerical integrals, and the sum as loss (8)."""
    v = torch.rand(16, D)
    found = nb.direction(rbm, nb.ExactGradient(), v)
    positive = nb.direction(rbm, lambda rbm, v: 0, v)
    mean, second = moments(rbm)
    W, b, sigma = rbm.W.detach().double(), rbm.b.detach().double(), torch.exp(rbm.log_sigma).detach().double()
    negative = {
        "W": (mean[:, None] * b / sigma + second @ W).flatten(),
        "b": mean @ W / sigma,
        "alpha": mean,
        "log_sigma": 1 - b / sigma * (mean @ W),
    }
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), positive[name].double() + negative[name], rtol=1e-3, atol=2e-3)


def test_states_are_all_and_different(nb):
    assert len({tuple(h) for h in nb.all_states(M).tolist()}) == 2**M


def test_a_sweep_leaves_p_of_h_as_it_is_and_reaches_it(nb, rbm):
    """Chains that start at p(h) stay there; chains that start anywhere come to it. chi^2 over all 64 states."""
    with torch.no_grad():
        rbm.W *= 3
        p = torch.softmax(nb.log_f(rbm, HIDDEN), 0)
        _, own, pairs = nb.hidden_model(rbm)
    n, place = 40000, 2.0 ** torch.arange(M - 1, -1, -1)
    for h, sweeps in (HIDDEN[torch.multinomial(p, n, replacement=True)], 1), (torch.zeros(n, M), 30):
        for _ in range(sweeps):
            h = nb.sweep(h, own, pairs)
        counts = torch.bincount((h @ place).long(), minlength=2**M)
        often = p * n > 5
        chi2 = ((counts - p * n).square() / (p * n))[often].sum().item()
        assert chi2 < often.sum() + 5 * math.sqrt(2 * often.sum())
        assert h.shape == (n, M)


def test_persistent_chains_give_the_mean_of_log_f_at_their_states(nb, rbm):
    torch.manual_seed(3)
    chains = nb.PersistentChains(M, sweeps=2)
    value = chains(rbm, None)
    assert value.item() == pytest.approx(nb.log_f(rbm, chains.h).mean().item())
    assert chains.h.any()
    before = chains.h.clone()
    chains(rbm, None)
    assert not torch.equal(chains.h, before)
    assert chains.state_dict().keys() == {"h"}
    expected = torch.autograd.grad(nb.log_f(rbm, before).mean(), rbm.W)[0]
    torch.testing.assert_close(torch.autograd.grad(value, rbm.W)[0], expected)


def test_exact_training_raises_the_likelihood_and_persistent_chains_follow(tmp_path):
    nb = small_problem(tmp_path)
    ends = {}
    for name, negative in ("exact", nb.ExactGradient()), ("chains", nb.PersistentChains(8)):
        rbm = nb.new_rbm(8, 0, learn_sigma=True)
        nb.fit(name, rbm, negative, 0, rate=0.003, falls=True, centred=True)
        ends[name] = nb.log_likelihood(rbm, nb.exact_log_z(rbm)).mean().item()
        assert torch.exp(rbm.log_sigma).min().item() >= nb.SIGMA_MIN * 0.9999
    start = nb.new_rbm(8, 0)
    assert ends["exact"] > nb.log_likelihood(start, nb.exact_log_z(start)).mean().item() + 20
    assert ends["chains"] == pytest.approx(ends["exact"], abs=5)


# What is measured


def test_ais_agrees_with_the_exact_value_from_both_starts(nb, rbm, monkeypatch):
    with torch.no_grad():
        rbm.W *= 3
        exact = nb.exact_log_z(rbm).item()
    for on in 0.5, 0.9:
        log_weights = []
        for seed in range(10):
            monkeypatch.setattr(nb, "SEED", seed)
            log_weights.append(nb.ais_log_weights(rbm, torch.full((M,), on)))
        weights = torch.exp(torch.cat(log_weights) - exact)
        assert weights.mean().item() == pytest.approx(1, abs=4 * weights.std().item() / math.sqrt(len(weights)))
        assert 0 < weights.std() < 3
    monkeypatch.undo()
    estimate, apart = nb.ais_log_z(rbm)
    assert estimate == pytest.approx(exact, abs=0.2)
    assert 0 < apart < 0.4


def test_log_likelihood_is_that_of_the_mixture_over_hidden_states(nb, rbm):
    v = nb.dequantise(nb.x_test).double()
    W, b, alpha, sigma = (p.detach().double() for p in (rbm.W, rbm.b, rbm.alpha, torch.exp(rbm.log_sigma)))
    h = HIDDEN.double()
    log_p_h = torch.log_softmax(h @ alpha + h @ W @ (b / sigma) + 0.5 * (h @ W).square().sum(1), 0)
    means = b + sigma * (h @ W)
    log_p = torch.stack([torch.distributions.Normal(mean, sigma).log_prob(v).sum(1) for mean in means], 1) + log_p_h
    expected = torch.logsumexp(log_p, 1)
    found = nb.log_likelihood(rbm, nb.exact_log_z(rbm))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2)
    assert nb.judge(rbm)["loglik_test"] == pytest.approx(expected.mean().item(), rel=1e-5)
    values, apart = nb.test_scores(rbm)
    torch.testing.assert_close(values, found)
    assert apart == 0


def test_errors_by_plain_numpy(nb, rbm):
    W, b, alpha = (p.detach().numpy().astype(float) for p in (rbm.W, rbm.b, rbm.alpha))
    sigma, x = np.exp(rbm.log_sigma.detach().numpy().astype(float)), nb.x_test.numpy().astype(float)
    hidden = 1 / (1 + np.exp(-(alpha + (x / sigma) @ W.T)))
    row = nb.judge(rbm)
    assert row["mse_test"] == pytest.approx(np.mean((x - (b + sigma * (hidden @ W))) ** 2), rel=1e-5)
    assert row["bits_mse_test"] == pytest.approx(np.mean((x - (b + sigma * ((hidden > 0.5) @ W))) ** 2), rel=1e-5)


def test_ppca_and_diagonal_gaussian_are_the_densities_they_say(nb, monkeypatch):
    train, test = torch.rand(500, 5) @ torch.randn(5, 12) + torch.randn(500, 12), torch.randn(60, 12)
    for scale in 1, 0.01:
        monkeypatch.setattr(nb, "x_train", train * scale)
        monkeypatch.setattr(nb, "x_test", test * scale)
        monkeypatch.setattr(nb, "dequantise", lambda x, seed=0: x)
        pca = PCA(3, svd_solver="full").fit(train.double().numpy() * scale)
        if scale == 1:
            np.testing.assert_allclose(nb.ppca(3).numpy(), pca.score_samples(test.double().numpy()), rtol=1e-6)
            expected = torch.distributions.Normal(train.mean(0), train.std(0)).log_prob(test).sum(1)
            torch.testing.assert_close(nb.diagonal_gaussian(), expected)
        best = 12 * torch.distributions.Normal(0.0, nb.SIGMA_MIN).log_prob(torch.tensor(0.0)).item()
        assert nb.ppca(3).max().item() <= best, "no density above the floor's"
        assert nb.diagonal_gaussian().max().item() <= best + 1e-4


def test_dequantised_pixels_keep_their_grey_level(nb):
    x = torch.randint(0, 256, (20, D)).float() / 255
    noisy = nb.dequantise(x)
    assert torch.equal((noisy * 256).floor(), (x * 255).round())
    assert torch.equal(noisy, nb.dequantise(x))


def test_cosines_and_errors_of_means(nb):
    a, b = {"W": torch.tensor([1.0, 0.0])}, {"W": torch.tensor([1.0, 1.0])}
    assert nb.cosines(a, b) == {"cosine_W": pytest.approx(math.sqrt(0.5))}
    mean, error = nb.mean_and_error(torch.tensor([1.0, 2.0, 3.0, 4.0]), 3.0)
    assert (mean, error) == (2.5, pytest.approx(math.hypot(np.std([1, 2, 3, 4], ddof=1) / 2, 3)))
    rows = [{"e": 0.1}, {"e": 0.3}]
    assert nb.plus_minus(rows, "e", 3) == f"0.200 ± {np.std([0.1, 0.3], ddof=1):.3f}"
    assert nb.plus_minus(rows[:1], "e", 3) == "0.100"


def test_samples_are_of_the_model(nb, rbm, monkeypatch):
    """Exact draws at small M and sweeps at larger M: the same first moments, up to their errors."""
    monkeypatch.setattr(nb, "SWEEPS", 30)
    mean = moments(rbm)[0].float()
    drawn = nb.sample_hidden(rbm, 5000)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.04, rtol=0)
    large = nb.GBRBM(20, torch.rand(D), 0.3 + torch.rand(D)).requires_grad_(False)
    large.alpha.normal_()
    own = torch.sigmoid(
        large.alpha + large.W @ (large.b / torch.exp(large.log_sigma)) + 0.5 * large.W.square().sum(1)
    )
    torch.testing.assert_close(nb.sample_hidden(large, 3000).mean(0), own, atol=0.2, rtol=0)
    monkeypatch.setattr(nb, "CHAIN_LENGTH", 3)
    ends = nb.chain_ends(rbm, nb.x_test)
    assert ends.shape == (40, M)
    assert set(ends.unique().tolist()) <= {0.0, 1.0}


# The data


def load_synthetic(tmp_path, there=FILES):
    """Run the cells that load the data on synthetic files of the true size and header."""
    nb = load_module("hw5_rbm", OUT=str(tmp_path / "out"), DATA=str(tmp_path / "data"))
    publish(nb, "KMNIST", idx_files(60000, 10000), there)
    found = nbformat.read(ROOT / "hw5_rbm.ipynb", as_version=4).cells
    exec(next(c.source for c in found if c.cell_type == "code" and "data = load_kmnist()" in c.source), vars(nb))
    return nb


def title_of_a_figure(nb):
    fig = plt.figure()
    nb.show(fig, "any", "Title")
    return fig.get_suptitle()


def test_default_split_has_469_updates_an_epoch(tmp_path, offline):
    nb = load_synthetic(tmp_path)
    assert (nb.data.split, len(nb.x_train), len(nb.x_test)) == ("default", 60000, 10000)
    assert (nb.passes, nb.updates, len(nb.data.blobs)) == (1, 25 * 469, 4)
    assert 0 <= nb.x_train.min() < nb.x_train.max() <= 1
    assert title_of_a_figure(nb) == "Title"
    assert nb.data.banner == ""
    assert len(list(nb.batches(nb.x_train[:, :1]))) == 469


def test_stand_in_split_is_stratified_and_labelled_everywhere(tmp_path, offline, capsys):
    nb = load_synthetic(tmp_path, there=FILES[1:])
    assert UNREACHABLE in capsys.readouterr().out
    assert (nb.data.split, len(nb.x_train), len(nb.x_test)) == ("t10k-only 6:1", 8572, 1428)
    assert nb.updates == 25 * 469
    assert len(list(nb.batches(nb.x_train[:, :1]))) == 469
    assert title_of_a_figure(nb) == "Stand-in split: Title"
    assert "Stand-in split" in nb.data.banner
    x = np.frombuffer(idx_files(60000, 10000)[FILES[2]][16:], np.uint8).reshape(-1, 784)
    both = torch.cat([nb.data.x_train, nb.data.x_test]).cpu().numpy().reshape(-1, 784)
    assert np.array_equal(np.unique(x, axis=0), np.unique(both, axis=0)), "a partition of the test images"
    label = {image.tobytes(): y for image, y in zip(x, nb.data.y_test.tolist())}
    counts = np.bincount([label[image.cpu().numpy().tobytes()] for image in nb.data.x_test])
    np.testing.assert_allclose(counts / np.bincount(nb.data.y_test.cpu()), 1428 / 10000, atol=1e-3)


def test_committed_report_says_which_split_it_is():
    metrics = json.loads((ROOT / "figures" / "hw5_rbm_metrics.json").read_text())
    found = nbformat.read(ROOT / "hw5_rbm.ipynb", as_version=4).cells
    banner = next(c for c in found if c.cell_type == "code").outputs[0]["data"]["text/html"]
    assert ("Stand-in split" in banner) == (metrics["split"] == "t10k-only 6:1")
    assert metrics["split"] in ("default", "t10k-only 6:1")


# Training


def fit_small(out):
    """Train a small RBM with persistent chains in `out`; returns its weights and history."""
    nb = small_problem(out)
    rbm = nb.new_rbm(8, seed=0, learn_sigma=True)
    history = nb.fit("toy", rbm, nb.PersistentChains(8), seed=0, falls=True)
    return rbm.state_dict(), history


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][key], b[0][key]) for key in a[0])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit_small(tmp_path_factory.mktemp("uninterrupted"))


def test_training_learns_and_repeats_itself(uninterrupted, tmp_path):
    history = uninterrupted[1]
    assert history[-1]["mse_test"] < 0.99 * history[0]["mse_test"]
    assert history[-1]["loglik_test"] > history[0]["loglik_test"]
    assert same(fit_small(tmp_path), uninterrupted)


def test_a_killed_run_resumes_to_the_same_numbers(uninterrupted, tmp_path):
    assert 1 <= kill_in_training("test_rbm", tmp_path, "hw5_rbm/toy") < EPOCHS
    assert same(fit_small(tmp_path), uninterrupted)


def test_the_learning_rate_falls_in_the_second_half(tmp_path, monkeypatch):
    nb, rates, optimizers, adam = small_problem(tmp_path), [], [], torch.optim.Adam
    nb.EPOCHS, watch = 4, nb.watch
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **o: optimizers.append(adam(*a, **o)) or optimizers[-1])
    nb.watch = lambda *a, **o: rates.append(optimizers[-1].param_groups[0]["lr"]) or watch(*a, **o)
    for falls in True, False:
        nb.fit(f"toy_{falls}", nb.new_rbm(4, 0), nb.cd1, 0, rate=0.1, falls=falls)
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.0, *[0.1] * 4])  # after each epoch


def test_several_trainings_differ_in_their_seeds_and_are_all_judged(tmp_path):
    nb = small_problem(tmp_path)
    nb.EPOCHS = 2
    rbm, history, rows = nb.trainings("toy", 4, nb.train_with(nb.cd5), runs=3)
    assert len({row["mse_test"] for row in rows}) == 3
    assert rows[0] == nb.judge(rbm)
    assert len(history["mse_test"]) == 2
    assert {"cosine_W", "loglik_test"} <= history.keys(), (
        "the first training with CD-5 is compared with the exact one"
    )
    assert -1 <= history["cosine_W"][-1] <= 1
    assert (tmp_path / "checkpoints" / "toy.pt").exists()


# On a GPU


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_everything_stays_on_a_gpu(tmp_path, bf16):
    """What is trained and what is measured, but for the backward pass, which fake tensors cannot do here."""
    nb = small_problem(tmp_path)
    with fake_gpu() as rules:
        cuda = rules.device
        nb.DEVICE, nb.BF16, nb.SWEEPS, nb.CHAIN_LENGTH, nb.AIS_STEPS = cuda, bf16, 2, 2, 2
        v = nb.x_train = nb.x_test = torch.zeros(128, D, device=cuda)
        nb.mean_image = nb.spread = torch.ones(D, device=cuda)
        for M in 8, 20:
            with cuda:
                rbm = nb.GBRBM(M, torch.zeros(D), torch.ones(D), learn_sigma=True)
            phases = [nb.cd5, nb.PersistentChains(M), *([nb.ExactGradient()] if M == 8 else [])]
            for negative in phases:
                with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                    assert (rbm.free_energy(v).mean() + negative(rbm, v)).device.type == "cuda"
            nb.translate(rbm, nb.mean_image)
            assert rbm.gibbs(v, 2).dtype == torch.float32
            assert nb.chain_ends(rbm, v[:2]).device.type == "cuda"
            assert nb.sample_hidden(rbm, 4).device.type == "cuda"
            assert nb.judge(rbm)["mse_test"] == 1
            assert nb.test_scores(rbm)[0].device.type == "cpu"
        with pytest.raises(RuntimeError, match="device"):
            nb.cd5(rbm, v.to("cpu"))


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_no_step_of_training_waits_for_a_copy(tmp_path):
    nb = small_problem(tmp_path)
    with fake_gpu() as rules:
        nb.DEVICE = cuda = rules.device
        nb.x_train, nb.mean_image, counted = torch.zeros(300, D, device=cuda), torch.zeros(D, device=cuda), []
        nb.watch = lambda *args, **options: counted.append(rules.copies) or {"mse_test": 1.0}
        nb.epochs = lambda name, parts, history, **arguments: counted.append(rules.copies) or [1]
        with cuda:
            rbm = nb.GBRBM(16, torch.zeros(D), torch.ones(D), learn_sigma=True)
        for negative in nb.cd5, nb.PersistentChains(16), nb.ExactGradient():
            nb.fit("toy", rbm, negative, 0)
    assert counted[::2] == counted[1::2]

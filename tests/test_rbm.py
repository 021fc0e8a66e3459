"""The RBM notebook's definitions, against enumeration, numerical integrals, sampling, autograd and numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import FILES, UNREACHABLE, data_cell, execute, idx_files, load_module, publish, small_problem
from sklearn.decomposition import PCA
from torch.distributions import Normal

M, D = 6, 784
HIDDEN = torch.tensor(list(itertools.product([0.0, 1.0], repeat=M)))


@pytest.fixture(scope="module")
def nb(tmp_path_factory):
    return small_problem("hw5_rbm", tmp_path_factory.mktemp("out"))


@pytest.fixture
def rbm(nb):
    """A small RBM with random parameters on which every term matters."""
    model = nb.GBRBM(M, torch.rand(D), 0.3 + torch.rand(D), learn_sigma=True)
    with torch.no_grad():
        model.W.normal_(0, 0.05)
        model.alpha.normal_()
    return model


def theta(rbm):
    """W, b, alpha and sigma in double precision."""
    W, b, alpha, log_sigma = (p.detach().double() for p in (rbm.W, rbm.b, rbm.alpha, rbm.log_sigma))
    return W, b, alpha, torch.exp(log_sigma)


def energy(rbm, v, h):
    """The assignment's energy. v: (784,); h: (n, M). Returns (n,)."""
    sigma = torch.exp(rbm.log_sigma)
    coupling = torch.einsum("ji,nj,i->n", rbm.W, h, v / sigma)
    return -(coupling - ((v - rbm.b) ** 2 / (2 * sigma**2)).sum() + h @ rbm.alpha)


def log_integrals(rbm):
    """log of the integral of exp(-E(v, h)) over v, pixel by pixel on a grid, for every hidden state: (2^M,)."""
    W, b, alpha, sigma = theta(rbm)
    offsets = torch.linspace(-9, 9, 361, dtype=torch.float64)[:, None]
    v, terms = b + sigma * offsets, []
    for h in HIDDEN.double():
        exponent = v / sigma * (h @ W) - (v - b) ** 2 / (2 * sigma**2)
        terms.append((torch.logsumexp(exponent, 0) + torch.log(sigma * 0.05)).sum() + h @ alpha)
    return torch.stack(terms)


def moments(rbm):
    """E[h] and E[h h^T] under p(h), from numerical integrals; float64."""
    p, h = torch.softmax(log_integrals(rbm), 0), HIDDEN.double()
    return p @ h, torch.einsum("n,nj,nk->jk", p, h, h)


# The model


def test_start_is_the_templates_and_the_rules(nb):
    rbm = nb.new_rbm(256, seed=0)
    shapes = {"W": (256, D), "b": (D,), "alpha": (256,), "log_sigma": (D,)}
    assert {key: tuple(value.shape) for key, value in rbm.state_dict().items()} == shapes
    assert rbm.W.std().item() == pytest.approx(0.01, rel=0.01)
    assert not rbm.alpha.any()
    assert torch.equal(rbm.b, nb.mean_image)
    torch.testing.assert_close(torch.exp(rbm.log_sigma), nb.data.x_train.flatten(1).div(255).std(0).clamp(min=0.1))
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
        p, means = torch.softmax(-energy(rbm, v, HIDDEN), 0), rbm.visible_mean(HIDDEN)
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


def test_cd_is_the_positive_minus_the_negative_phase(nb, rbm):
    """By hand, equation (9) of derivations.md, at the data and at the end of the very chain that was run."""
    v, ends, gibbs = torch.rand(16, D), [], rbm.gibbs
    rbm.gibbs = lambda v, k: ends.append((k, gibbs(v, k))) or ends[-1][1]
    found = nb.direction(rbm, nb.cd5, v)
    ((k, end),) = ends
    assert (k, end.requires_grad) == (5, False)
    W, b, sigma = rbm.W.detach(), rbm.b.detach(), torch.exp(rbm.log_sigma).detach()

    def phase(v):
        h = torch.sigmoid(rbm.hidden_input(v)).detach()
        return {
            "W": h.T @ (v / sigma) / len(v),
            "b": ((v - b) / sigma**2).mean(0),
            "alpha": h.mean(0),
            "log_sigma": ((v - b) ** 2 / sigma**2 - v / sigma * (h @ W)).mean(0),
        }

    positive, negative = phase(v), phase(end)
    assert found.keys() == positive.keys()
    for name, gradient in found.items():
        expected = (positive[name] - negative[name]).flatten()
        torch.testing.assert_close(-gradient, expected, rtol=1e-3, atol=1e-4)


def test_log_f_and_log_z_by_brute_force(nb, rbm):
    expected = log_integrals(rbm)
    with torch.no_grad():
        torch.testing.assert_close(nb.log_f(rbm, HIDDEN).double(), expected, rtol=1e-6, atol=1e-3)
        assert nb.exact_log_z(rbm).item() == pytest.approx(torch.logsumexp(expected, 0).item(), abs=1e-3)


def test_exact_gradient_is_that_of_the_moments(nb, rbm):
    """Equation (14) of derivations.md, with moments from numerical integrals, and the sum as loss (8)."""
    v = torch.rand(16, D)
    found, positive = nb.direction(rbm, nb.exact, v), nb.direction(rbm, lambda rbm, v: 0, v)
    mean, second = moments(rbm)
    W, b, _, sigma = theta(rbm)
    negative = {
        "W": (mean[:, None] * b / sigma + second @ W).flatten(),
        "b": mean @ W / sigma,
        "alpha": mean,
        "log_sigma": 1 - b / sigma * (mean @ W),
    }
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), positive[name].double() + negative[name], rtol=1e-3, atol=2e-3)


def test_a_sweep_leaves_p_of_h_as_it_is_and_reaches_it(nb, rbm):
    """Chains that start at p(h) stay there; chains that start anywhere come to it. chi^2 over all 64 states."""
    with torch.no_grad():
        rbm.W *= 3
        p = torch.softmax(log_integrals(rbm), 0).float()
        _, own, pairs = nb.hidden_model(rbm)
    n, place = 40000, 2.0 ** torch.arange(M - 1, -1, -1)
    for h, sweeps in (HIDDEN[torch.multinomial(p, n, replacement=True)], 1), (torch.zeros(n, M), 30):
        for _ in range(sweeps):
            h = nb.sweep(h, own, pairs)
        counts = torch.bincount((h @ place).long(), minlength=2**M)
        often = p * n > 5
        chi2 = ((counts - p * n).square() / (p * n))[often].sum().item()
        assert chi2 < often.sum() + 5 * math.sqrt(2 * often.sum())


def test_persistent_chains_give_the_gradient_of_log_f_at_their_states_and_go_on(nb, rbm):
    chains = nb.PersistentChains(M, sweeps=2)
    value, states = chains(rbm, None), chains.h.clone()
    assert states.any()
    expected = nb.log_f(rbm, states).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, rbm.W), torch.autograd.grad(expected, rbm.W))
    chains(rbm, None)
    assert not torch.equal(chains.h, states)


def test_exact_training_raises_the_likelihood_and_persistent_chains_follow(tmp_path):
    nb, ends = small_problem("hw5_rbm", tmp_path), {}
    for name, negative in ("exact", nb.exact), ("chains", nb.PersistentChains(8)):
        rbm = nb.new_rbm(8, 0, learn_sigma=True)
        nb.fit(name, rbm, negative, 0, rate=0.003, falls=True, centred=True)
        ends[name] = nb.log_likelihood(rbm, nb.exact_log_z(rbm)).mean().item()
        assert torch.exp(rbm.log_sigma).min().item() >= nb.SIGMA_MIN * 0.9999
    start = nb.new_rbm(8, 0)
    assert ends["exact"] > nb.log_likelihood(start, nb.exact_log_z(start)).mean().item() + 20
    assert ends["chains"] == pytest.approx(ends["exact"], abs=5)


def test_the_learning_rate_falls_in_the_second_half_if_asked(tmp_path):
    nb, rates = small_problem("hw5_rbm", tmp_path, EPOCHS=4), []

    def epochs(name, parts, history, *args, **options):
        for epoch in range(1, 5):
            yield epoch
            rates.append(parts["optimizer"].param_groups[0]["lr"])

    nb.epochs = epochs
    for falls in True, False:
        nb.fit("toy", nb.new_rbm(4, 0), nb.cd1, 0, rate=0.1, falls=falls)
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.0, *[0.1] * 4])  # after each epoch


def test_several_trainings_differ_in_their_seeds_and_are_all_judged(tmp_path):
    nb = small_problem("hw5_rbm", tmp_path, EPOCHS=2)
    rbm, history, rows = nb.trainings("toy", 4, nb.cd5, runs=3)
    assert len({row["mse_test"] for row in rows}) == 3
    assert rows[0] == nb.judge(rbm)
    assert {key: len(values) for key, values in history.items()}.items() >= {"cosine_W": 2, "loglik_test": 2}.items()
    assert -1 <= history["cosine_W"][-1] <= 1
    assert nb.plus_minus(rows[:1], "mse_test", 3) == f"{rows[0]['mse_test']:.3f}"
    errors = [row["mse_test"] for row in rows]
    assert nb.plus_minus(rows, "mse_test", 5) == f"{np.mean(errors):.5f} ± {np.std(errors, ddof=1):.5f}"


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
    estimate, apart = nb.ais_log_z(rbm)
    assert estimate == pytest.approx(exact, abs=0.2)
    assert 0 < apart < 0.4


def test_log_likelihood_is_that_of_the_mixture_over_hidden_states(nb, rbm):
    v, (W, b, alpha, sigma), h = nb.dequantise(nb.x_test).double(), theta(rbm), HIDDEN.double()
    log_p_h = torch.log_softmax(h @ alpha + h @ W @ (b / sigma) + 0.5 * (h @ W).square().sum(1), 0)
    log_p = torch.stack([Normal(b + sigma * (state @ W), sigma).log_prob(v).sum(1) for state in h], 1) + log_p_h
    expected = torch.logsumexp(log_p, 1)
    torch.testing.assert_close(nb.test_scores(rbm)[0].double(), expected, rtol=1e-5, atol=1e-2)
    assert nb.test_scores(rbm)[1] == 0
    assert nb.judge(rbm)["loglik_test"] == pytest.approx(expected.mean().item(), rel=1e-5)
    origin = torch.rand(D)
    nb.translate(rbm, origin)
    found = nb.log_likelihood(rbm, nb.exact_log_z(rbm), origin)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2)


def test_errors_by_plain_numpy(nb, rbm):
    (W, b, alpha, sigma), x = (p.numpy() for p in theta(rbm)), nb.x_test.numpy().astype(float)
    hidden = 1 / (1 + np.exp(-(alpha + (x / sigma) @ W.T)))
    row = nb.judge(rbm)
    assert row["mse_test"] == pytest.approx(np.mean((x - (b + sigma * (hidden @ W))) ** 2), rel=1e-5)
    assert row["bits_mse_test"] == pytest.approx(np.mean((x - (b + sigma * ((hidden > 0.5) @ W))) ** 2), rel=1e-5)


def test_ppca_and_diagonal_gaussian_are_the_densities_they_say(nb, monkeypatch):
    train, test = torch.rand(500, 5) @ torch.randn(5, 12) + torch.randn(500, 12), torch.randn(60, 12)
    monkeypatch.setattr(nb, "dequantise", lambda x, seed=0: x)
    for scale in 1, 0.01:
        monkeypatch.setattr(nb, "x_train", train * scale)
        monkeypatch.setattr(nb, "x_test", test * scale)
        if scale == 1:
            expected = PCA(3, svd_solver="full").fit(train.double().numpy()).score_samples(test.double().numpy())
            np.testing.assert_allclose(nb.ppca(3).numpy(), expected, rtol=1e-6)
            expected = Normal(train.mean(0), train.std(0)).log_prob(test).sum(1)
            torch.testing.assert_close(nb.diagonal_gaussian(), expected)
        best = 12 * Normal(0.0, nb.SIGMA_MIN).log_prob(torch.tensor(0.0)).item()
        assert nb.ppca(3).max().item() <= best, "no density above the floor's"
        assert nb.diagonal_gaussian().max().item() <= best + 1e-4


def test_dequantised_pixels_keep_their_grey_level(nb):
    x = torch.randint(0, 256, (20, D)).float() / 255
    noisy = nb.dequantise(x)
    assert torch.equal((noisy * 256).floor(), (x * 255).round())
    assert torch.equal(noisy, nb.dequantise(x))


def test_errors_of_means_add_in_quadrature(nb):
    mean, error = nb.mean_and_error(torch.tensor([1.0, 2.0, 3.0, 4.0]), 3.0)
    assert (mean, error) == (2.5, pytest.approx(math.hypot(np.std([1, 2, 3, 4], ddof=1) / 2, 3)))


def test_samples_are_of_the_model(nb, rbm, monkeypatch):
    """Exact draws at small M and sweeps at larger M: the same first moments, up to their errors."""
    monkeypatch.setattr(nb, "SWEEPS", 30)
    torch.testing.assert_close(nb.sample_hidden(rbm, 5000).mean(0), moments(rbm)[0].float(), atol=0.04, rtol=0)
    large = nb.new_rbm(20, seed=0).requires_grad_(False)
    large.W.zero_()  # so that the units are independent
    large.alpha.normal_()
    torch.testing.assert_close(nb.sample_hidden(large, 5000).mean(0), torch.sigmoid(large.alpha), atol=0.04, rtol=0)
    monkeypatch.setattr(nb, "CHAIN_LENGTH", 3)
    ends = nb.chain_ends(rbm, nb.x_test)
    assert {(ends.shape, *ends.unique().tolist())} == {((len(nb.x_test), M), 0.0, 1.0)}


# The data


def synthetic(tmp_path, there):
    """The notebook on files of the true size and header, as far as they are there."""
    nb = load_module("hw5_rbm", OUT=str(tmp_path / "out"), DATA=str(tmp_path / "data"))
    publish(nb, "KMNIST", idx_files(60000, 10000), there)
    execute(data_cell("hw5_rbm"), nb)
    return nb


def test_default_split_has_469_updates_an_epoch(tmp_path, offline):
    nb = synthetic(tmp_path, there=FILES)
    assert (nb.data.split, len(nb.x_train), len(nb.x_test), nb.data.banner) == ("default", 60000, 10000, "")
    assert (nb.passes, nb.updates, len(nb.data.blobs)) == (1, 25 * 469, 4)
    assert (nb.x_train.min(), nb.x_train.max()) == (0, 1)
    assert len(list(nb.batches(nb.x_train[:, :1]))) == 469


def test_stand_in_split_is_stratified_and_labelled_everywhere(tmp_path, offline, capsys):
    nb = synthetic(tmp_path, there=FILES[1::2])
    assert UNREACHABLE in capsys.readouterr().out
    assert (nb.data.split, len(nb.x_train), len(nb.x_test)) == ("t10k-only 6:1", 8572, 1428)
    assert (nb.updates, len(list(nb.batches(nb.x_train[:, :1])))) == (25 * 469, 469)
    assert "Stand-in split" in nb.data.banner
    nb.show(figure := nb.plt.figure(), "any", "Title")
    assert figure.get_suptitle() == "Stand-in split: Title"
    found = nb.read_files("KMNIST")
    label = dict(zip(map(bytes, found[FILES[1]].flatten(1).numpy()), found[FILES[3]].tolist()))
    train, test = ([bytes(image) for image in part.flatten(1).numpy()] for part in (nb.data.x_train, nb.data.x_test))
    assert {*train, *test} == {*label}, "a partition of the test images"
    counts = [np.bincount([label[image] for image in part]) for part in (test, list(label))]
    np.testing.assert_allclose(counts[0] / counts[1], 1428 / 10000, atol=1e-3)

"""The RBM notebook's own code; derivations.md is held against sums and integrals of the energy alone."""

import math

import numpy as np
import pytest
import torch
from conftest import FILES, code_cells, execute, idx_files, load_module, publish
from sklearn.decomposition import PCA, FactorAnalysis
from torch.distributions import Normal

D, M = 2, 6
STEP = 0.1
AXIS = torch.arange(-10, 10, STEP, dtype=torch.float64)
GRID = torch.cartesian_prod(*[AXIS] * D)  # (n, D)
HIDDEN = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * M)  # (2^M, M)


@pytest.fixture
def rbm(nb):
    """An RBM with random parameters on which every term matters, and images of its size."""
    nb.x_train, nb.x_test = torch.rand(200, D), torch.rand(100, D)
    model = nb.GBRBM(M, torch.rand(D), 0.4 + 0.6 * torch.rand(D), learn_sigma=True)
    model.W = torch.nn.Parameter(0.7 * torch.randn(M, D))
    torch.nn.init.normal_(model.alpha)
    return model


def theta(rbm):
    """W, b, alpha and sigma in double precision."""
    W, b, alpha, log_sigma = (p.detach().double() for p in (rbm.W, rbm.b, rbm.alpha, rbm.log_sigma))
    return W, b, alpha, torch.exp(log_sigma)


def energy(theta, v, h):
    """The assignment's energy. v: (..., D); h: (..., M)."""
    W, b, alpha, sigma = theta
    coupling = torch.einsum("ji,...j,...i->...", W, h.double(), v / sigma)
    return -(coupling - ((v - b) ** 2 / (2 * sigma**2)).sum(-1) + h.double() @ alpha)


def joint(theta):
    """exp(-E) of all hidden states at all points of the grid, times the area around each: (2^M, n)."""
    return torch.exp(-energy(theta, GRID, HIDDEN[:, None])) * STEP**D


def p_of_h(rbm):
    weights = joint(theta(rbm)).sum(1)
    return weights / weights.sum()


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_equations_2_and_4_visible_given_hidden(rbm):
    (W, b, _, sigma), p, x = theta(rbm), joint(theta(rbm)), AXIS[:, None]
    f = x / sigma * (HIDDEN.double() @ W)[:, None] - (x - b) ** 2 / (2 * sigma**2)
    integral_form = torch.softmax(f, 1) / STEP  # (2^M, len(AXIS), D)
    product = torch.einsum("nx,ny->nxy", *integral_form.unbind(-1)).flatten(1)
    assert_close(product, p / p.sum(1, keepdim=True) / STEP**D)
    assert_close(torch.exp(Normal(rbm.visible_mean(HIDDEN)[:, None], sigma).log_prob(x)), integral_form)


def test_equations_6_and_7_hidden_given_visible_and_free_energy(rbm):
    v = torch.randn(9, D)
    log_weights = -energy(theta(rbm), v[:, None], HIDDEN)
    assert_close(torch.sigmoid(rbm.hidden_input(v)), torch.softmax(log_weights, 1) @ HIDDEN.double())
    assert_close(rbm.free_energy(v), -torch.logsumexp(log_weights, 1))


def test_equations_8_13_and_14_gradient_of_log_z(nb, rbm):
    """That of the integral is not the mean over p(v), the mean over p(h), or the formula in moments of p(h)."""
    W, b, alpha, sigma = (p.requires_grad_() for p in theta(rbm))
    log_sigma = torch.log(sigma).detach().requires_grad_()
    log_z = torch.log(joint((W, b, alpha, torch.exp(log_sigma))).sum())
    expected = torch.autograd.grad(log_z, (W, b, alpha, log_sigma))
    p = joint(theta(rbm)) / torch.exp(log_z).item()
    over_v = -p.sum(0) @ rbm.free_energy(GRID.float()).double()
    over_h = p.sum(1) @ nb.log_f(rbm, HIDDEN).double()
    for value in over_v, over_h, nb.exact_log_z(rbm):
        assert_close(torch.autograd.grad(value, [rbm.W, rbm.b, rbm.alpha, rbm.log_sigma]), expected)
    mean, second = p.sum(1) @ HIDDEN.double(), torch.einsum("n,nj,nk->jk", p.sum(1), *[HIDDEN.double()] * 2)
    by_moments = mean[:, None] * b / sigma + second @ W, mean @ W / sigma, mean, 1 - b / sigma * (mean @ W)
    assert_close(by_moments, expected)


@pytest.mark.parametrize(("negative", "k"), [("cd1", 1), ("cd5", 5)])
def test_equations_9_and_10_contrastive_divergence(nb, rbm, negative, k):
    """The direction is not (9) at the end of the very chain that was run, held constant, less (9) at the data."""
    v, ends, gibbs = torch.rand(16, D), [], rbm.gibbs
    rbm.gibbs = lambda v, k: ends.append((k, gibbs(v, k))) or ends[-1][1]
    found = nb.direction(rbm, getattr(nb, negative), v)
    ((asked, end),) = ends
    assert asked == k
    W, b, _, sigma = theta(rbm)
    both = torch.stack([v, end]).double()
    h = torch.sigmoid(rbm.hidden_input(both.float())).detach().double()
    slopes = {
        "W": torch.einsum("pnj,pni->pnji", h, both / sigma),
        "b": (both - b) / sigma**2,
        "alpha": h,
        "log_sigma": (both - b) ** 2 / sigma**2 - both / sigma * (h @ W),
    }
    assert_close(found, {name: (slope[1] - slope[0]).mean(0).flatten() for name, slope in slopes.items()})


def test_equations_11_and_12_log_z_and_log_f(nb, rbm):
    (W, b, alpha, sigma), weights, h = theta(rbm), joint(theta(rbm)).sum(1), HIDDEN.double()
    exponents = h @ alpha + h @ W @ (b / sigma) + 0.5 * (h @ W).square().sum(1)
    by_formula = torch.log(math.sqrt(2 * math.pi) * sigma).sum() + torch.logsumexp(exponents, 0)
    assert_close(by_formula, torch.log(weights.sum()))
    assert_close(nb.log_f(rbm, HIDDEN), torch.log(weights))


def test_equation_15_persistent_chains_that_start_again_at_random_bits(nb, rbm):
    """The first chain does not live 10 updates on average, the last 1000, those between on a log scale."""
    chains = nb.PersistentChains(M, chains=400_000, sweeps=0)
    chains.h.fill_(2)  # which no bit is
    chains(rbm, None)
    anew = (chains.h != 2).all(1)
    assert torch.equal(anew, (chains.h != 2).any(1))
    by_life = np.split(anew.numpy() * np.geomspace(10, 1000, 400_000), 4)
    assert [part.mean() for part in by_life] == pytest.approx([1] * 4, rel=0.3)
    torch.testing.assert_close(chains.h[anew].mean(0), torch.full((M,), 0.5), atol=0.05, rtol=0)
    kept = nb.PersistentChains(M, sweeps=0, restarts=False)
    h = kept.h.bernoulli_().clone()
    assert_close(kept(rbm, None), nb.log_f(rbm, h).mean())
    assert torch.equal(kept.h, h)


def test_one_gibbs_step_samples_both_conditionals(rbm):
    """From one image, mean and covariance over many steps are not those of the mixture over h."""
    v = torch.rand(D)
    with torch.no_grad():
        p, means = torch.softmax(-energy(theta(rbm), v, HIDDEN), 0), rbm.visible_mean(HIDDEN).double()
    away = means - p @ means
    drawn = rbm.gibbs(v.expand(100_000, -1), 1).double()
    torch.testing.assert_close(drawn.mean(0), p @ means, atol=0.02, rtol=0)
    expected = torch.einsum("n,ni,nj->ij", p, away, away) + torch.diag(theta(rbm)[3] ** 2)
    torch.testing.assert_close(torch.cov(drawn.T), expected, atol=0.02, rtol=0.02)


def test_equation_17_images_less_a_constant(nb, rbm):
    v, origin, before = torch.rand(5, 1, D), torch.rand(D), theta(rbm)
    nb.translate(rbm, origin)
    assert_close(energy(theta(rbm), v - origin, HIDDEN), energy(before, v, HIDDEN))


def test_equation_16_sweeps_end_at_p_of_h(nb, rbm):
    """Chains that start at 0 do not come to it (chi^2 over the states)."""
    p, (_, own, pairs) = p_of_h(rbm).float(), nb.hidden_model(rbm.requires_grad_(False))
    h = torch.zeros(40000, M)
    for _ in range(30):
        h = nb.sweep(h, own, pairs)
    expected = 40000 * p
    counts, often = torch.bincount((h @ 2.0 ** torch.arange(M - 1, -1, -1)).long(), minlength=2**M), expected > 5
    chi2 = ((counts - expected).square() / expected)[often].sum().item()
    assert chi2 < often.sum() + 5 * math.sqrt(2 * often.sum())


def test_samples_are_of_the_model(nb, rbm):
    nb.SWEEPS = nb.CHAIN_LENGTH = 30
    expected = (p_of_h(rbm) @ HIDDEN.double()).float()
    torch.testing.assert_close(nb.sample_hidden(rbm, 5000).mean(0), expected, atol=0.04, rtol=0)
    large = nb.new_rbm(20, seed=0).requires_grad_(False)
    large.W.zero_()  # so that the units are independent
    large.alpha.normal_()
    torch.testing.assert_close(nb.sample_hidden(large, 5000).mean(0), torch.sigmoid(large.alpha), atol=0.04, rtol=0)
    torch.testing.assert_close(nb.chain_ends(rbm, torch.rand(5000, D)).mean(0), expected, atol=0.04, rtol=0)


def test_samples_beside_codes(nb, rbm):
    """Codes differ from codes, or samples that are off do not differ by how often the units are on in codes."""
    nb.x_test = torch.rand(20_000, D)
    p = torch.sigmoid(rbm.requires_grad_(False).hidden_input(nb.x_test))
    assert nb.beside_codes(rbm, torch.bernoulli(p)) == pytest.approx((1, 0), abs=0.03)
    assert nb.beside_codes(rbm, torch.zeros(9, M)) == pytest.approx((0, p.mean().item()), abs=0.01)


def test_start_is_the_templates_and_the_rules(nb):
    rbm = nb.new_rbm(256, seed=0)
    shapes = {"W": (256, 784), "b": (784,), "alpha": (256,), "log_sigma": (784,)}
    assert {key: tuple(value.shape) for key, value in rbm.state_dict().items()} == shapes
    assert rbm.W.std().item() == pytest.approx(0.01, rel=0.01)
    assert not rbm.alpha.any()
    assert torch.equal(rbm.b, nb.mean_image)
    torch.testing.assert_close(torch.exp(rbm.log_sigma), nb.data.x_train.flatten(1).div(255).std(0).clamp(min=0.1))
    assert not rbm.log_sigma.requires_grad
    assert torch.equal(rbm.W, nb.new_rbm(256, seed=0, learn_sigma=True).W), "the same start"
    assert (nb.BATCH, nb.CD_STEPS, nb.SIZES, nb.LEARNING_RATE) == (128, 5, (16, 64, 256), 1e-3)


def test_exact_training_raises_the_likelihood_and_persistent_chains_follow(nb):
    ends, chains = {}, nb.PersistentChains(8)
    for name, negative in ("exact", nb.exact_log_z), ("chains", chains):
        rbm = nb.new_rbm(8, 0, learn_sigma=True)
        nb.fit(name, rbm, negative, 0, rate=0.003, falls=True, centred=True)
        ends[name] = nb.log_likelihood(rbm, nb.exact_log_z(rbm)).mean().item()
        assert torch.exp(rbm.log_sigma).min().item() >= nb.SIGMA_MIN * 0.9999
    start = nb.new_rbm(8, 0)
    assert ends["exact"] > nb.log_likelihood(start, nb.exact_log_z(start)).mean().item() + 20
    assert ends["chains"] == pytest.approx(ends["exact"], abs=5)
    assert not chains.h.any(), "a training has moved the chains that the next one starts from"


def test_the_learning_rate_falls_in_the_second_half_if_asked(nb, monkeypatch):
    nb.EPOCHS, nb.BATCH, rates = 4, 256, []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam, *_: rates.append(adam.param_groups[0]["lr"]))
    for falls in True, False:
        nb.fit("toy", nb.new_rbm(4, 0), nb.cd1, 0, rate=0.1, falls=falls)
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, *[0.1] * 4])


def test_several_trainings_differ_in_their_seeds_and_are_all_judged(nb):
    nb.EPOCHS, well, asked, fit = 2, {"rate": 0.01, "falls": True, "centred": True}, [], nb.fit

    def spy(name, rbm, *args, **options):
        asked.append((rbm.log_sigma.requires_grad, options))
        return fit(name, rbm, *args, **options)

    nb.fit = spy
    rbm, history, rows = nb.trainings("toy", 4, negative=nb.cd5, runs=3, learn_sigma=True, **well)
    assert asked == [(True, well | {"floor": nb.SIGMA_MIN})] * 3
    errors = [row["mse_test"] for row in rows]
    assert len({*errors}) == 3
    assert rows[0] == nb.judge(rbm)
    for key in "mse_test", "loglik_test":
        assert history[key][-1] == pytest.approx(rows[0][key], rel=1e-3)
    assert nb.plus_minus(rows[:1], "mse_test", ".3f") == f"{errors[0]:.3f}"
    assert nb.plus_minus(rows, "mse_test", ".5f") == f"{np.mean(errors):.5f} ± {np.std(errors, ddof=1):.5f}"


def test_side_by_side_trainings_are_what_one_after_another_gives(nb, tmp_path, two_cores):
    nb.EPOCHS, watch, watched = 2, nb.watch, []
    nb.watch = lambda *args: watched.append(args) or watch(*args)
    ways = {M: {"name": f"toy{M}", "M": M, "negative": nb.cd5, "learn_sigma": M == 3} for M in (3, 4)}
    together = nb.side_by_side(ways | {5: {"name": "toy5", "M": 5, "negative": nb.cd1, "runs": 1}})
    assert not watched, "trained in this process"
    assert [len(rows) for _, _, rows in together.values()] == [nb.RUNS, nb.RUNS, 1]
    for path in (tmp_path / "demo" / "state" / "hw5_rbm").iterdir():
        path.unlink()
    torch.set_num_threads(1)
    for M, way in ways.items():
        rbm, history, rows = nb.trainings(**way)
        assert (history, rows) == together[M][1:]
        torch.testing.assert_close(rbm.state_dict(), together[M][0].state_dict(), rtol=0, atol=0)


def test_what_fails_beside_others_fails_in_the_notebook(nb, two_cores):
    nb.EPOCHS = 1
    with pytest.raises(FloatingPointError, match=r"toy_?\d? broke down in epoch 1"):
        nb.side_by_side({4: {"name": "toy", "M": 4, "negative": nb.cd1, "rate": 1e30}})


def test_annealed_weights_have_mean_z_from_any_start(nb, rbm):
    with torch.no_grad():
        rbm.W *= 1.5
        exact = nb.exact_log_z(rbm).item()
    for on in 0.5, 0.9:
        log_weights = [nb.ais(rbm, torch.full((M,), on))[0] for _ in range(10)]
        weights = torch.exp(torch.cat(log_weights) - exact)
        assert weights.mean().item() == pytest.approx(1, abs=4 * weights.std().item() / math.sqrt(len(weights)))
        assert 0 < weights.std() < 3
    estimate, apart, _ = nb.ais_log_z(rbm)
    assert estimate == pytest.approx(exact, abs=0.2)
    assert 0 < apart < 0.4


def test_log_likelihood_is_that_of_sum_and_integral(nb, rbm):
    v, origin = nb.dequantise(nb.x_test), torch.rand(D)
    log_z = torch.log(joint(theta(rbm)).sum())
    expected = torch.logsumexp(-energy(theta(rbm), v[:, None], HIDDEN), 1) - log_z
    found, disagreement = nb.test_scores(rbm)
    assert_close(found, expected)
    assert disagreement == 0
    assert nb.judge(rbm)["loglik_test"] == pytest.approx(expected.mean().item(), rel=1e-4)
    nb.translate(rbm, origin)
    assert_close(nb.log_likelihood(rbm, nb.exact_log_z(rbm), origin), expected)


def test_errors_by_plain_numpy(nb, rbm):
    (W, b, alpha, sigma), row = (p.numpy() for p in theta(rbm)), nb.judge(rbm)
    for part, x in ("train", nb.x_train.double().numpy()), ("test", nb.x_test.double().numpy()):
        hidden = 1 / (1 + np.exp(-(alpha + (x / sigma) @ W.T)))
        assert row[f"mse_{part}"] == pytest.approx(np.mean((x - (b + sigma * (hidden @ W))) ** 2), rel=1e-5)
    assert row["bits_mse_test"] == pytest.approx(np.mean((x - (b + sigma * ((hidden > 0.5) @ W))) ** 2), rel=1e-5)
    error = row["mse_test"]
    mean, of_images, over_trainings = nb.erred(rbm, [row, row | {"mse_test": 0.0}])
    assert (mean, over_trainings) == (pytest.approx(error / 2), pytest.approx(error / 2))
    np.testing.assert_allclose(of_images, np.mean((x - (b + sigma * (hidden @ W))) ** 2, 1), rtol=1e-4)


def test_linear_and_diagonal_gaussians_are_the_densities_they_say_and_have_a_floor(nb):
    train, test = torch.rand(500, 5) @ torch.randn(5, 12) + torch.randn(500, 12), torch.randn(60, 12)
    nb.x_train, nb.x_test, nb.dequantise = train, test, lambda x, seed=0: x
    models = PCA(3, svd_solver="full"), FactorAnalysis(3)
    for model in models:
        expected = model.fit(train.double().numpy()).score_samples(test.double().numpy())
        np.testing.assert_allclose(nb.linear_gaussian(model).numpy(), expected, rtol=1e-6)
    assert_close(nb.diagonal_gaussian(), Normal(train.mean(0), train.std(0)).log_prob(test).sum(1))
    train *= 0.01
    test *= 0.01
    best = 12 * Normal(0.0, nb.SIGMA_MIN).log_prob(torch.tensor(0.0)).item()
    assert max(values.max() for values in (*map(nb.linear_gaussian, models), nb.diagonal_gaussian())) <= best + 1e-4


def test_dequantised_pixels_keep_their_grey_level(nb):
    x = torch.randint(0, 256, (20, 784)).float() / 255
    noisy = nb.dequantise(x)
    assert torch.equal((noisy * 256).floor(), (x * 255).round())
    assert torch.equal(noisy, nb.dequantise(x))


def test_likelihoods_are_means_over_trainings_and_their_differences_paired(nb):
    a, b = torch.randn(2, 50)
    nb.test_scores = lambda rbm: (a, 0.3)
    rows = [{"loglik_test": nats} for nats in (1.0, 2.0, 4.0)]
    chains = nb.scored(None, rows, between=9.0)
    assert nb.largest_spread([rows[:2], rows, rows[:1]]) == np.std([1, 2, 4], ddof=1)
    assert nb.largest_spread([rows[:1]]) == 0
    assert nb.scored(None, [{"loglik_test": a.mean().item()}], between=9.0) == (a.mean().item(), a, 0.3, 9.0)
    for other, of_other in (None, torch.zeros(50)), ((b.mean().item(), b), b):
        mean, error = nb.with_error(chains, other)
        assert mean == pytest.approx(7 / 3 - of_other.mean().item())
        over_images, over_trainings = (a - of_other).std().item() / 50**0.5, np.std([1, 2, 4], ddof=1) / 3**0.5
        assert error == pytest.approx(math.hypot(over_images, 0.3, over_trainings))


def test_pairs_are_opposed_if_error_and_nats_are_both_lower_by_three_standard_errors(nb):
    nb.erred = lambda rbm, rows: (rbm[0], torch.zeros(50), 0.1)
    nb.scored = lambda rbm, rows, between: (rbm[1], torch.zeros(50), 1.0)
    ways = {"a": (1.0, 0.0), "b": (2.0, 5.0), "c": (0.9, -9.0), "d": (2.0, 3.0)}
    ways = {way: (numbers, None, None) for way, numbers in ways.items()}
    text = "*c* relative to *b*: error -1.1000 ± 0.1414, likelihood -14.0 ± 1.4 nats"
    assert nb.opposed(ways, "c", "b") == (True, text)
    for a, b in ("b", "c"), ("c", "a"), ("a", "d"):  # the other way, too close in error, too close in nats
        assert not nb.opposed(ways, a, b)[0]


@pytest.mark.parametrize(("there", "batch"), [(FILES, 128), (FILES, 256), (FILES[1::2], 128)])
def test_split_is_the_standard_one_or_a_stratified_part_of_the_test_images(tmp_path, offline, there, batch):
    """On files of the true size and header, as far as they are there."""
    nb = load_module("hw5_rbm", OUT=str(tmp_path / "out"), DATA=str(tmp_path / "data"), BATCH=batch)
    an_epoch, stand_in = math.ceil(60000 / batch), there != FILES
    publish(nb, "KMNIST", idx_files(60000, 10000), there)
    load = nb.load_data
    nb.load_data = lambda name, openml, blobs, **how: load(*nb.published, **how)
    execute(*code_cells("hw5_rbm", "data"), nb)
    sizes = len(nb.x_train), len(nb.x_test), nb.updates, len(list(nb.batches(nb.x_train[:, :1])))
    assert sizes == (*((8572, 1428) if stand_in else (60000, 10000)), 25 * an_epoch, an_epoch)
    assert (nb.x_train.min(), nb.x_train.max()) == (0, 1)
    assert {*nb.data.blobs} == {f"KMNIST/{file}" for file in there}
    nb.show(figure := nb.plt.figure(), "any", "Title")
    said = nb.data.split, figure.get_suptitle(), "Stand-in split" in nb.data.banner
    assert said == (("t10k-only 6:1", "Stand-in split: Title", True) if stand_in else ("default", "Title", False))
    if stand_in:
        assert load(*nb.published).split == "demo", "training images may be missing only if asked"
        whole = load(*nb.published, enough=there)
        label = dict(zip(map(bytes, whole.x_test.flatten(1).numpy()), whole.y_test.tolist()))
        train, test = ([*map(bytes, x.flatten(1).numpy())] for x in (nb.data.x_train, nb.data.x_test))
        assert sorted(train + test) == sorted(label), "a partition of the test images"
        shares = np.bincount([label[image] for image in test]) / np.bincount([*label.values()])
        np.testing.assert_allclose(shares, 1428 / 10000, atol=1e-3)

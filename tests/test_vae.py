"""The VAE notebook's own code, against torch's distributions, closed forms, Monte Carlo and plain numpy."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_module, small_problem
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F


@pytest.fixture
def models(nb):
    """A VAE and a C-VAE with random weights, for which z and the class matter."""
    made = [kind().requires_grad_(False) for kind in (nb.VAE, nb.CVAE)]
    for model in made:
        torch.nn.init.normal_(model.fc3.weight, std=0.5)
        torch.nn.init.constant_(model.fc22.bias, -1.0)
    return made


def test_layers_are_the_templates(nb):
    for kind, n_class in (nb.VAE, 0), (nb.CVAE, 10), (nb.BlindCVAE, 10):
        layers = {name: tuple(layer.weight.shape) for name, layer in kind().named_children()}
        shapes = [(400, 784 + n_class), (20, 400), (20, 400), (400, 20 + n_class), (784, 400)]
        assert layers == dict(zip(["fc1", "fc21", "fc22", "fc3", "fc4"], shapes))
    assert (nb.BATCH, nb.LEARNING_RATE) == (128, 1e-3)


def test_terms_against_torch_distributions(nb):
    logits, x = torch.randn(7, 784) * 100, torch.rand(7, 784)  # so large that a sigmoid saturates
    mu, logvar = torch.randn(7, 20), torch.randn(7, 20)
    bce, kl = nb.negative_elbo_terms(logits, x, mu, logvar)
    torch.testing.assert_close(kl, kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum(1))
    torch.testing.assert_close(bce, -Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(1))


def test_class_reaches_the_cvaes_encoder_and_decoder_one_hot(nb):
    model, x, z, c = nb.CVAE(), torch.rand(10, 784), torch.randn(10, 20), torch.arange(10)
    expected = nb.VAE.encode(model, torch.cat([x, torch.eye(10)], 1))
    torch.testing.assert_close(model.encode(x, c), expected)
    torch.testing.assert_close(model.decode(z, c), nb.VAE.decode(model, torch.cat([z, torch.eye(10)], 1)))
    blind = nb.BlindCVAE()
    blind.load_state_dict(model.state_dict())
    torch.testing.assert_close(blind.encode(x, c), model.encode(x, torch.zeros_like(c)))
    torch.testing.assert_close(blind.decode(z, c), model.decode(z, c))


def test_forward_samples_with_the_encoders_mean_and_spread(nb, models):
    models[0].decode = lambda z, c: z  # see z itself
    z, mu, logvar = models[0](nb.x_val[:1].expand(20000, -1))
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.05, rtol=0)
    torch.testing.assert_close(z.std(0), torch.exp(0.5 * logvar[0]), atol=0, rtol=0.05)


def test_elbo_by_monte_carlo_over_densities(nb, models):
    x, c = nb.x_val[:1], nb.y_val[:1]
    for model in models:
        mu, logvar = model.encode(x, c)
        q = Normal(mu[0], torch.exp(0.5 * logvar[0]))
        z = q.sample((20000,))
        log_p_x = Bernoulli(logits=model.decode(z, c.expand(20000)), validate_args=False).log_prob(x)
        terms = (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1) - log_p_x.sum(1)
        error = (terms.std() / math.sqrt(len(terms))).item()
        assert sum(nb.evaluate(model, x, c, draws=2000)) == pytest.approx(terms.mean().item(), abs=6 * error + 1e-3)
        assert error < 0.3


def test_iwae_reaches_the_exact_likelihood_where_that_is_known(nb, models):
    """With a decoder that ignores z but not the class, so that p(x|c) is known, the bound does not reach it."""
    for model in models:
        torch.nn.init.zeros_(model.fc3.weight[:, :20])
        for layer, value in (model.fc21, 0.1), (model.fc22, math.log(0.81)):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.constant_(layer.bias, value)
        bce, kl = nb.evaluate(model, nb.x_val, nb.y_val)
        assert kl > 0.05
        assert nb.iwae_bound(model, nb.x_val, nb.y_val, 2000).mean().item() == pytest.approx(bce, abs=0.02)

    row, logits = nb.unlabelled(models), [m.decode(torch.zeros(10, 20), torch.arange(10)).double() for m in models]
    plain, each = (F.softplus(t).sum(1) - nb.x_test.double() @ t.T for t in logits)  # -log p(x|c): (n, 10)
    mixture, told = math.log(10) - torch.logsumexp(-each, 1), each.gather(1, nb.y_test[:, None])[:, 0]
    gain = plain[:, 0] - mixture
    expected = {"vae_iwae_same_samples": plain, "cvae_unlabelled_iwae": mixture, "label_saves": mixture - told}
    for key, values in (expected | {"unlabelled_difference": gain}).items():
        assert row[key] == pytest.approx(values.mean().item(), abs=0.2), key
    assert row["unlabelled_difference_se"] == pytest.approx(gain.std().item() / math.sqrt(len(gain)), rel=0.1)
    right = (each.argmin(1) == nb.y_test).double().mean().item()
    assert row["cvae_generative_accuracy"] == pytest.approx(right, abs=0.02)


def test_gaps_are_the_known_ones_of_a_linear_gaussian_model(nb, models, monkeypatch):
    """There the best diagonal q has the precision's diagonal and the full one is exact; the gaps say otherwise."""
    A, encode = torch.zeros(784, 20), models[0].encode
    A[300:320] = torch.randn(20, 20) / 4 + torch.eye(20)
    model = SimpleNamespace(encode=encode, decode=lambda z, c: z @ A.T)
    monkeypatch.setattr(F, "softplus", lambda t: 0.5 * t.square())  # so that log p(x|z) = x . A z - |A z|^2 / 2
    nb.GAP_STEPS, nb.GAP_IMAGES = 400, 50
    row, x, precision = nb.gaps(model), nb.x_test[:50], A.T @ A + torch.eye(20)
    mu, logvar = encode(x)
    error = mu - x @ A @ torch.linalg.inv(precision)
    away = (error @ precision * error).sum(1) + (logvar.exp() * precision.diagonal() - 1 - logvar).sum(1)
    amortisation = 0.5 * (away - precision.diagonal().log().sum()).mean().item()
    covariance = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
    assert row["amortisation_gap"] == pytest.approx(amortisation, rel=0.05, abs=0.15)
    assert row["covariance_gap"] == pytest.approx(covariance, abs=0.15)
    assert row["rest_gap"] == pytest.approx(0, abs=0.1)
    assert 0 < row["iwae_gap"] < amortisation + covariance


def test_validation_part_is_a_stratified_fifth_of_the_training_images(tmp_path):
    nb = load_module("hw5_vae", "data", DATA="demo", OUT=str(tmp_path))
    assert (len(nb.x_train), len(nb.x_val)) == (1200, 300)
    share = torch.bincount(nb.y_val) / torch.bincount(nb.y_train)
    assert share.sub(0.25).abs().max() < 0.02
    both, images = torch.cat([nb.x_train, nb.x_val]), nb.data.x_train.flatten(1) / 255
    assert sorted(both.tolist()) == sorted(images.tolist())


def test_stopping_rule_and_choice_of_weights(nb):
    scores = [250 - 10 * (1 - 0.9**e) for e in range(1, 121)]
    history = [{"epoch": e, "loss": 0.0} for e in range(1, 121)]
    for row, score in zip(history, scores):
        if row["epoch"] % nb.VALIDATE_EVERY == 0:
            row.update({key: score + k for k, key in enumerate(reversed(nb.WEIGHTS))})
    first, *later = [e for e in range(1, 121) if nb.is_flat(history[:e])]
    assert scores[first - nb.PATIENCE - 1] - scores[first - 1] == pytest.approx(0.1, abs=0.06)
    assert later == list(range(first + 1, 121))
    assert nb.best_of(history) == (scores[119], 120, nb.WEIGHTS[-1])
    nb.VALIDATE_EVERY = 2 * nb.PATIENCE
    rare = [{"epoch": e} | ({} if e % nb.VALIDATE_EVERY else {nb.WEIGHTS[0]: -e}) for e in range(1, 121)]
    assert not any(nb.is_flat(rare[:e]) for e in range(1, 121)), "flat for want of a score in the last epochs"


def test_training_stops_when_flat_and_ends_with_the_weights_that_were_best(nb):
    nb.PATIENCE, nb.VALIDATE_EVERY = 4, 2
    model, evaluate, calls = nb.CVAE(), nb.evaluate, itertools.count()

    def worse_each_time(model, x, c):
        bce, kl = evaluate(model, x, c)
        return bce + (100 * next(calls) if x is nb.x_val else 0), kl

    nb.evaluate = worse_each_time
    history = nb.fit("toy", model, seed=0)
    assert [row["epoch"] for row in history] == [2, 4, 6, 8]
    assert nb.best_of(history) == (sum(evaluate(model, nb.x_val, nb.y_val)), 2, "raw")
    nb.fit("toy", again := nb.CVAE(), seed=0)  # goes on after the last epoch
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_averages_are_taken_every_few_steps_and_decay_with_each_step(tmp_path, monkeypatch):
    nb = small_problem("hw5_vae", tmp_path, BATCH=35, AVERAGE_EVERY=3, DECAYS=(0.9,), VALIDATE_EVERY=1)
    model, found, weights, step = nb.VAE(), {}, [], torch.optim.Adam.step

    def record(*args):
        step(*args)
        weights.append(model.fc4.bias.detach().clone())

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    nb.epochs, nb.validate = lambda *_: [1, 2], lambda candidates, *_: found.update(candidates)
    nb.fit("toy", model, seed=0)
    expected, *later = weights[2::3]
    for weight in later:
        expected = 0.9**3 * expected + (1 - 0.9**3) * weight
    torch.testing.assert_close(found["EMA 0.9"].fc4.bias.detach(), expected)


def test_a_collapsed_posterior_stops_the_training(nb, models):
    for layer in models[0].fc21, models[0].fc22:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    with pytest.raises(FloatingPointError, match="collapsed to the prior by epoch 5: try another SEED"):
        nb.validate({"raw": models[0]}, models[0], [{"epoch": 5}])


def test_the_later_trainings_are_measured_once_and_enter_means_and_deviations(nb):
    nb.METRICS = {}

    def size(model):
        return {"value": float(model)}

    nb.over_runs({"toy_": [1, 2, 3]}, size)
    assert nb.METRICS.pop("toy_size_other_runs") == [{"value": 2.0}, {"value": 3.0}]
    assert nb.METRICS == {"toy_value": 2, "toy_value_std": 1}
    nb.over_runs({"one_": [4]}, size, trains=True)
    assert nb.METRICS["one_size"] == {"value": 4.0}, "the first, too, is taken once"
    assert (nb.told("toy_value"), nb.told("one_value:.1%")) == ("2.00 ± 1.00", "400.0%")


def test_codes_are_in_order_and_z_is_drawn_from_q(nb, models):
    codes = nb.codes(models[1], "train", draws=3)
    mu, logvar = models[1].encode(nb.x_train, nb.y_train)
    np.testing.assert_allclose(codes.mu, mu, atol=1e-5)
    eps = (codes.z.reshape(3, *mu.shape) - codes.mu) / torch.exp(0.5 * logvar).numpy()
    assert (eps.mean(), eps.std()) == (pytest.approx(0, abs=0.04), pytest.approx(1, abs=0.04))
    np.testing.assert_allclose(np.corrcoef(eps.reshape(3, -1)), np.eye(3), atol=0.04)


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")  # of codes that a line separates
def test_ledger_of_codes_that_are_known(nb):
    """The class, alone in the first dimension and far apart, is not all of log 10 nats; elsewhere z is N(0, I)."""
    rng, made = np.random.default_rng(0), {}
    many = {name: np.arange(n) % 10 for name, n in (("train", 6000), ("val", 1000), ("test", 3000))}
    for name, y in many.items():
        z = rng.normal(size=(len(y), 20)).astype(np.float32)
        z[:, 0] = 10 * y + 0.1 * z[:, 0]
        made[name] = z
    nb.codes = lambda model, name, draws=1: SimpleNamespace(mu=made[name], z=np.tile(made[name], (draws, 1)))
    nb.labels, nb.evaluate, nb.COMPONENTS = many, lambda *args: (0.0, 2000.0), 10
    row = nb.class_in_codes(object())
    assert row["class_information"] == pytest.approx(math.log(10), abs=0.02)
    exact = 0.5 * np.mean([(10 * c) ** 2 + 0.01 - 1 - math.log(0.01) for c in range(10)])  # mean KL(q(z|c) || p)
    assert row["aggregate_kl"] == pytest.approx(exact, abs=0.5)
    assert row["marginal_kl"] == pytest.approx(exact - math.log(10), abs=0.7)
    assert row["class_kl"] + row["rest_of_kl"] == pytest.approx(2000)
    assert (nb.neighbours(object()) != np.arange(3000)[:, None]).all(), "an image is its own neighbour"
    assert row["same_class_neighbours"] == row["z_knn"] == row["mu_knn"] == 1
    assert row["mu_linear_probe"] > 0.99
    assert row["silhouette"] > 0.2


def test_verdicts(nb):
    values = {0.8: "failed", 0.7: "failed", 0.6: "held in direction", 0.2: "held in direction", 0.15: "held"}
    assert {value: nb.verdict(0.75, value, 0.1)[0] for value in values} == values


def test_labels_told_to_the_encoder(nb):
    c = torch.arange(10).repeat(500)
    nb.SETS["test"] = c, c
    for how, share in ("true", 1), ("one", 0.1), ("wrong", 0), ("random", 0.1):
        label = nb.told_labels("test", how)
        assert (label == c).double().mean().item() == pytest.approx(share, abs=0.02 if how == "random" else 1e-9)
        assert how == "one" or abs(torch.bincount(label) - 500).max() < 100


def test_swaps_read_the_label_from_an_encoder_that_writes_it_and_the_class_from_one_that_does_not(nb):
    classes = {len(c): c for _, c in nb.SETS.values()}

    def write(x, c):
        return 20 * F.one_hot(c, 20).float(), torch.full((len(c), 20), -2.0)

    row = nb.swaps(SimpleNamespace(encode=write, decode=lambda z, c: torch.zeros(len(z), 784)))
    assert {share for key, share in row.items() if key.endswith("given")} == {1}
    assert {row[f"swap_wrong_label_{of}true_class"] for of in ("", "z_")} == {0}
    assert max(row[f"swap_{how}_label_{of}true_class"] for how in ("random", "one") for of in ("", "z_")) < 0.3
    kl = kl_divergence(Normal(20 * torch.eye(20)[0], math.exp(-1)), Normal(0, 1)).sum().item()
    assert row["swap_one_label_kl"] == pytest.approx(kl)
    nb.evaluate = lambda *args: (0.0, 0.0)
    row = nb.swaps(SimpleNamespace(encode=lambda x, c: write(x, classes[len(x)])))
    assert {share for key, share in row.items() if key.endswith("true_class")} == {1}

"""The GAN notebook's own code, against autograd, scipy, loops and plain numpy."""

import copy
import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from scipy.spatial.distance import cdist
from torch import nn


def test_weights_start_as_in_the_dcgan_paper(nb):
    for layer in itertools.chain(*(player.modules() for player in nb.new_gan(seed=0))):
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
        elif hasattr(layer, "weight") and layer.weight.numel() > 1000:
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(layer.weight.mean().item()) < 0.002


def test_loss_is_finite_where_a_sigmoid_saturates(nb):
    huge = torch.tensor([[1000.0], [-1000.0]])
    assert all(math.isfinite(term) for term in nb.minimax_terms(huge, huge))


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_each_player_steps_along_its_own_gradient_only(nb, monkeypatch, penalty):
    monkeypatch.setattr(torch.optim, "Adam", lambda p, betas, fused, **up: torch.optim.SGD(p, **up))
    nb.x_train, nb.LEARNING_RATE, nb.BF16 = nb.x_train[: nb.BATCH], 0.01, False
    nb.epochs, nb.score = lambda *_, **__: [torch.manual_seed(3) and 1], lambda *_: {}
    generator, discriminator = copy.deepcopy(players := nb.new_gan(seed=0))
    for player in players:  # as score() leaves them
        player.eval()
    (row,) = nb.fit("toy", *players, seed=3, length=1, penalty=penalty)
    torch.manual_seed(3)
    x, z = nb.x_train[torch.randperm(nb.BATCH)].requires_grad_(), torch.randn(nb.BATCH, 100)
    real, fake = discriminator.train()(x), discriminator(generator.train()(z))
    d_real, d_fake = torch.sigmoid(real), torch.sigmoid(fake)
    terms = d_real.log().mean(), (1 - d_fake).log().mean()
    expected = [1, *(term.item() for term in (*terms, d_real.mean(), d_fake.mean()))]
    assert row == pytest.approx(dict(zip(["epoch", *nb.LOGGED], expected)), rel=1e-4)
    (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    less = penalty * nb.PENALTY_EVERY * 0.5 * slope.square().sum() / len(x)
    for before, after, goal in (discriminator, players[1], sum(terms) - less), (generator, players[0], -sum(terms)):
        gradients = torch.autograd.grad(goal, list(before.parameters()), retain_graph=True)
        expected = [p + 0.01 * gradient for p, gradient in zip(before.parameters(), gradients)]
        torch.testing.assert_close(list(after.parameters()), expected, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_is_constant_then_falls_to_zero_and_some_steps_are_penalised(nb, monkeypatch):
    seen, penalised, step, slope = [], [], torch.optim.Adam.step, nb.squared_slope

    def spy(optimizer, *args):
        seen.append(optimizer.param_groups[0]["lr"] / nb.LEARNING_RATE)
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    nb.BATCH, nb.PENALTY_EVERY, nb.score = 32, 4, lambda *_: {}
    nb.squared_slope = lambda *args: penalised.append(len(seen) // 2) or slope(*args)
    nb.fit("toy", *nb.new_gan(seed=0), seed=0, length=2, penalty=1.0)
    np.testing.assert_allclose(seen, np.minimum(1, 2 * (1 - np.arange(12) / 12)).repeat(2))  # steps of two players
    assert penalised == [0, 4, 6, 10]


def test_a_discriminator_that_wins_stops_the_training(nb):
    nb.PATIENCE, nb.score = 4, lambda *_: {}  # steps, of which an epoch has three
    nb.minimax_terms = lambda real, fake: (0 * real.mean(), 0 * fake.mean())
    with pytest.raises(FloatingPointError, match="toy: the discriminator won by epoch 2"):
        nb.fit("toy", *nb.new_gan(seed=0), seed=0, length=2, penalty=0.5)


def test_pool_and_validation_are_the_training_images_and_draws_of_the_pool_are_stratified(nb):
    rows, images = nb.draw_rows(250, seed=0), nb.to_input(nb.data.x_train)
    assert len(nb.x_val) == len(images) // 6
    together = torch.cat([nb.x_pool, nb.x_val]).flatten(1).tolist()
    assert sorted(together) == sorted(images.flatten(1).tolist())
    of_all, *shares = [torch.bincount(y) / len(y) for y in (nb.data.y_train, nb.y_val, nb.y_pool[rows])]
    assert max((share - of_all).abs().max() for share in shares) < 0.01
    assert not np.array_equal(rows, nb.draw_rows(250, seed=1))
    assert len({*nb.y_pool[nb.draw_rows(nb.labelled(0.001), seed=0)].tolist()}) == 10, "one of each class"


def test_frechet_distance_against_scipy(nb):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3000, 8)) @ rng.normal(size=(8, 8))
    b = rng.normal(size=(2000, 8)) @ rng.normal(size=(8, 8)) + 0.5
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert nb.frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-6)


def test_density_and_coverage_against_scipy(nb):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(60, 3)), rng.normal(size=(50, 3)) * 1.5
    inside = cdist(fake, real) < np.sort(cdist(real, real))[:, 5]  # the distance to the fifth other one
    density, coverage = nb.density_and_coverage(torch.tensor(real), torch.tensor(fake))
    assert density == pytest.approx(inside.sum(1).mean() / 5)
    assert coverage == pytest.approx(inside.any(0).mean())
    assert 0 < coverage < 1


def test_measure_counts_what_is_confidently_a_digit(nb):
    """The shares are not those of the answers, which this ruler reads off the first pixels."""
    nb.ruler = nn.Sequential(nn.Flatten(), nn.Linear(784, 10, bias=False))
    nb.ruler[1].weight.data.copy_(torch.eye(10, 784))
    images = torch.full((40, 1, 28, 28), -1.0) + 0.01 * torch.randn(40, 1, 28, 28)
    for row in range(40):
        images[row, 0, 0, row % 4] = 4.3 if row % 2 else 2  # e^5.3 : 9 is more, e^3 : 9 less than 0.95 : 0.05
    found = nb.measure(images[:20], images)
    assert found["confident_share"] == 0.5
    assert (found["digit_share_min"], found["digit_share_max"]) == (0, 0.25)
    fake, real = images[:20].flatten(1).double(), images.flatten(1).double()  # this ruler's features
    assert found["frechet"] == pytest.approx(nb.frechet_distance(fake, real))
    assert (found["density"], found["coverage"]) == nb.density_and_coverage(real, fake)


def test_two_sample_test_sees_a_difference_only_where_there_is_one(nb):
    nb.steps = 60
    halves = nb.x_pool[:1200].chunk(2)
    assert nb.two_sample_test(*halves) == pytest.approx(0.5, abs=0.1)
    assert nb.two_sample_test(halves[0], -halves[1]) > 0.95


def test_shifted_images_are_all_of_the_25_and_no_others(nb):
    image = nb.x_pool[:1]
    padded = np.pad(image[0, 0].numpy(), nb.SHIFT, constant_values=-1)
    expected = {padded[i : i + 28, j : j + 28].tobytes() for i, j in itertools.product(range(5), repeat=2)}
    assert {one[0].numpy().tobytes() for one in nb.shifted(image.expand(2000, -1, -1, -1))} == expected


def test_features_are_the_same_alone_or_in_company_and_of_the_weights_of_the_moment(nb, monkeypatch):
    _, discriminator = nb.new_gan(seed=0)
    together, alone = (nb.codes(discriminator.features, nb.x_val[:n]) for n in (20, 1))
    np.testing.assert_allclose(together[:1], alone, atol=1e-4)
    asked = []
    monkeypatch.setattr(nb, "infer", lambda network, x, infer=nb.infer: asked.append(x) or infer(network, x))
    for _ in range(2):
        nb.probe_accuracy(discriminator)
    assert sum(x is nb.x_val for x in asked) == 2, "features of former weights were remembered"


def test_settings_are_chosen_by_the_first_draws_validation_accuracy_alone(nb):
    """A setting is chosen by test images or by another draw. Here settings say how many images they get right."""
    asked, n = [], round(0.2 * len(nb.x_train))

    def learn(x, y, draw, val, test):
        rows = nb.draw_rows(n, seed=draw)
        torch.testing.assert_close((x, y), (nb.x_pool[rows], nb.y_pool[rows]))
        asked.append((draw, val))
        known = {id(nb.x_val): (nb.y_val, val), id(nb.x_test): (nb.y_test, test), id(x): (y, n)}

        def classify(images):
            classes, right = known[id(images)]
            return torch.where(torch.arange(len(classes)) < right, classes, -1)

        return classify

    settings = [{"val": 5, "test": 9}, {"val": 8, "test": 2}, {"val": 8, "test": 7}]
    found = nb.study(learn, settings, share=0.2)
    assert asked == [(0, 5), (0, 8), (0, 8), *((draw, 8) for draw in range(1, nb.DRAWS))]
    assert found.pop("setting") == settings[1]
    expected = {"train": 1.0, "val": 8 / len(nb.x_val), "test": pytest.approx(2 / len(nb.x_test))}
    expected["wrong"] = " ".join(map(str, range(2, len(nb.x_test))))
    assert found == {part: [value] * nb.DRAWS for part, value in expected.items()}


def test_paired_differences_have_an_error_over_draws_and_over_test_images(nb):
    nb.x_test, chances = range(400), np.random.default_rng(0)
    wrong = {name: chances.random((5, 400)) < share for name, share in (("a", 0.1), ("b", 0.1), ("c", 0.0))}
    for name, rows in wrong.items():
        nb.METRICS[f"study_{name}"] = {"wrong": [" ".join(map(str, np.flatnonzero(row))) for row in rows]}
    for name, other in ("a", "b"), ("a", "c"):
        difference, error = nb.paired(name, other)
        assert difference == pytest.approx(100 * (wrong[other].mean() - wrong[name].mean()))
        means = [(wrong[other].mean(axis), wrong[name].mean(axis)) for axis in (0, 1)]
        errors = [difference / scipy.stats.ttest_rel(*pair).statistic for pair in means]
        assert error == pytest.approx(np.hypot(*errors))
    assert nb.compared("a", "c", "c") == f"{-difference:.2f} ± {error:.2f} points below c"
    assert nb.compared("c", "a", "a") == f"{-difference:.2f} ± {error:.2f} points above a"
    assert nb.compared("a", "b", "b").startswith("not clearly above or below b (")


def test_fine_tuning_starts_from_the_discriminator_leaves_it_as_it_is_and_labels_are_learned(nb):
    features, started, moved, train = nb.new_gan(seed=0)[1].features, [], [], nb.train_classifier
    before, rows = copy.deepcopy(features.state_dict()), nb.draw_rows(600, seed=0)
    nb.train_classifier = lambda network, *a: started.append(network.features[0].weight.clone()) or train(network, *a)
    nb.shifted = lambda images, shifted=nb.shifted: moved.append(len(started)) or shifted(images)
    for pretrained, steps, shifts in ([features], 2, False), (None, 60, True):
        nb.steps, setting = steps, {"rate": 2e-3, "pretrained": pretrained, "shifts": shifts}
        classify = nb.by_training(nb.x_pool[rows], nb.y_pool[rows], 0, **setting)
    assert moved == [2] * 60, "each batch of the training with shifts is shifted, and no other"
    assert [torch.equal(weight, before["0.weight"]) for weight in started] == [True, False]
    assert all(torch.equal(value, before[key]) for key, value in features.state_dict().items())
    assert nb.accuracy(classify, nb.x_val, nb.y_val) > 0.8


def test_random_network_has_measured_statistics(nb):
    network = nb.random_network()
    first = next(i for i, layer in enumerate(network) if isinstance(layer, nn.BatchNorm2d))
    norm, values = network[first], network[:first](nb.x_train)
    torch.testing.assert_close(norm.running_mean, values.mean((0, 2, 3)), rtol=0.01, atol=0.01)
    assert network[0].weight.std().item() == pytest.approx(math.sqrt(2 / (1 + 0.2**2) / 16), rel=0.1)


def test_autoencoder_reconstructs_better_and_is_trained_once(nb):
    features = nb.autoencoder(5e-4)
    assert nb.autoencoder(5e-4) is features
    state = nb.data.out / "state" / nb.NAME / "autoencoder_0.0005.pt"
    first, *_, last = torch.load(state, weights_only=True)["history"]
    assert last["epoch"] == nb.AUTOENCODER_EPOCHS
    assert last["loss"] < first["loss"]
    assert not any(p.requires_grad for p in features.parameters())

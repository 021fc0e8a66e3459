"""The GAN notebook's definitions, against autograd, scipy, loops and plain numpy."""

import copy
import itertools
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from conftest import ROOT, fake_gpu, load_module
from sklearn.linear_model import LogisticRegression
from torch import nn

EPOCHS = 4
FIGURE_1 = {
    "discriminator": ["14x14x64", "7x7x128", "4x4x256", "4x4x512", "1"],
    "generator": ["12544", "7x7x256", "14x14x128", "28x28x64", "28x28x32", "28x28x1"],  # 12544 = 7x7x256
}


def heed_interrupts():
    """For a process to be started: SIGINT works, also where the tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_in_training(module, folder, run, by=signal.SIGKILL):
    """Start the module's fit_small(folder) as a process, and kill it once the run has saved its first epochs.

    Returns how many epochs it had done.
    """
    code = f"from {module} import fit_small; fit_small({str(folder)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tests", preexec_fn=heed_interrupts)
    state = folder / "state" / f"{run}.pt"
    while not state.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(by)
    assert process.wait() == -by
    return len(torch.load(state, weights_only=True)["history"])


def small_problem(out):
    """Definitions with a small data set in place: digits."""
    nb = load_module("hw5_gan", OUT=str(out), DATA="demo", EPOCHS=EPOCHS, STEPS=8, RULER_STEPS=40)
    digits = nb.load_mnist()
    nb.data = SimpleNamespace(split="demo", label="", blobs={}, out=Path(out))
    nb.x_train, nb.x_pool, nb.y_pool = nb.to_input(digits.x_train[:192]), nb.to_input(digits.x_pool), digits.y_pool
    nb.x_val, nb.y_val = nb.to_input(digits.x_val), digits.y_val
    nb.x_test, nb.y_test = nb.to_input(digits.x_test), digits.y_test
    torch.manual_seed(0)
    nb.ruler = nb.new_classifier().to(nb.DEVICE).eval()
    return nb


@pytest.fixture(scope="module")
def nb(tmp_path_factory):
    return small_problem(tmp_path_factory.mktemp("out"))


# The networks and the loss


@pytest.mark.parametrize("name", FIGURE_1)
def test_every_shape_of_figure_1(nb, name):
    network, x = {
        "discriminator": (nb.new_discriminator(), torch.zeros(2, 1, 28, 28)),
        "generator": (nb.new_generator(), torch.zeros(2, 100)),
    }[name]
    shapes = []
    for layer in network:
        x = layer(x)
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Unflatten)):
            shapes.append("x".join(map(str, (*x.shape[2:], x.shape[1]))))
    assert shapes == FIGURE_1[name]


def test_weights_start_as_in_the_dcgan_paper(nb):
    for network in nb.new_gan(seed=0):
        for layer in network:
            if isinstance(layer, nn.BatchNorm2d):
                assert (layer.weight == 1).all()
            elif hasattr(layer, "weight") and layer.weight.numel() > 1000:
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
                assert abs(layer.weight.mean().item()) < 0.002


def test_loss_in_logits_is_the_formula_in_probabilities(nb):
    real, fake = torch.randn(2, 1000, 1, dtype=torch.float64) * 3
    d_real, d_fake = 1 / (1 + torch.exp(-real)), 1 / (1 + torch.exp(-fake))
    real_term, fake_term = nb.minimax_terms(real, fake)
    torch.testing.assert_close(real_term, d_real.log().mean())
    torch.testing.assert_close(fake_term, (1 - d_fake).log().mean())
    huge = torch.tensor([[1000.0], [-1000.0]])
    assert all(math.isfinite(term) for term in nb.minimax_terms(huge, huge))
    assert sum(nb.minimax_terms(torch.zeros(1), torch.zeros(1))).item() == pytest.approx(-math.log(4))


def test_the_generators_gradient_is_weighed_by_d_of_g_of_z(nb):
    """As the discussion says: the derivative of log(1 - D) by the logit is -D, so what D recognises pulls least."""
    fake = torch.linspace(-6, 6, 50, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(50 * nb.minimax_terms(torch.zeros(50), fake)[1], fake)
    torch.testing.assert_close(gradient, -torch.sigmoid(fake).detach())


# Training


def step_once(nb, monkeypatch):
    """fit() with one step of plain gradient ascent and descent. Returns the players before and after."""
    rates = {}

    def sgd(parameters, betas, fused, maximize=False):
        rates["maximize" if maximize else "minimize"] = maximize
        return torch.optim.SGD(parameters, maximize=maximize)

    monkeypatch.setattr(torch.optim, "Adam", sgd)
    monkeypatch.setattr(nb, "score", lambda *_: {})
    monkeypatch.setattr(nb, "BF16", False)
    monkeypatch.setattr(nb, "LEARNING_RATE", 0.1)
    monkeypatch.setattr(nb, "x_train", nb.x_train[: nb.BATCH])
    monkeypatch.setattr(nb, "epochs", lambda *_, **__: [1])
    players = nb.new_gan(seed=0)
    before = copy.deepcopy(players)
    nb.fit("toy", *players, seed=3, length=1, dropout=0.0)
    return before, players, rates


def test_each_player_steps_along_its_own_gradient_only(nb, monkeypatch):
    """One plain step against gradients by a separate autograd.grad for each player."""
    (generator, discriminator), players, rates = step_once(nb, monkeypatch)
    assert rates == {"maximize": True, "minimize": False}
    torch.manual_seed(3)
    rows = torch.randperm(nb.BATCH)
    z = torch.randn(nb.BATCH, 100)
    for layer in discriminator:
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
    real, fake = discriminator.train()(nb.x_train[rows]), discriminator(generator.train()(z))
    value = torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean()
    climb = torch.autograd.grad(value, list(discriminator.parameters()), retain_graph=True)
    descend = torch.autograd.grad(value, list(generator.parameters()))
    for before, after, gradients, sign in (
        (discriminator, players[1], climb, 1),
        (generator, players[0], descend, -1),
    ):
        for p, q, gradient in zip(before.parameters(), after.parameters(), gradients):
            torch.testing.assert_close(q, p + sign * 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_learning_rate_and_dropout_are_constant_then_fall_to_zero(tmp_path, monkeypatch):
    nb, seen = small_problem(tmp_path), []
    adam = torch.optim.Adam.step

    def spy(optimizer, *args):
        rates = {layer.p for layer in discriminator if isinstance(layer, nn.Dropout2d)}
        seen.append((optimizer.param_groups[0]["lr"] / nb.LEARNING_RATE, rates.pop() / nb.DROPOUT, len(rates)))
        return adam(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    monkeypatch.setattr(nb, "score", lambda *_: {})
    generator, discriminator = nb.new_gan(seed=0)
    nb.fit("toy", generator, discriminator, seed=0, length=2)
    steps = len(seen) // 2  # of two players
    expected = np.minimum(1, 2 * (1 - np.arange(steps) / steps)).repeat(2)
    np.testing.assert_allclose([row[0] for row in seen], expected)
    np.testing.assert_allclose([row[1] for row in seen], expected)
    assert not any(row[2] for row in seen)


def fit_small(out):
    """Train a small GAN in `out`; returns its weights and history."""
    nb = small_problem(out)
    generator, discriminator = nb.new_gan(seed=0)
    history = nb.fit("toy", generator, discriminator, seed=0)
    return {**generator.state_dict(), **{f"d{k}": v for k, v in discriminator.state_dict().items()}}, history


def same(a, b):
    return a[1] == b[1] and all(torch.equal(value, b[0][key]) for key, value in a[0].items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit_small(tmp_path_factory.mktemp("uninterrupted"))


def test_a_killed_run_resumes_to_the_same_numbers(uninterrupted, tmp_path):
    assert 1 <= kill_in_training("test_gan", tmp_path, "hw5_gan/toy") < EPOCHS
    assert same(fit_small(tmp_path), uninterrupted)


def test_history_has_the_means_over_each_epoch_and_the_scores(nb, uninterrupted):
    _, history = uninterrupted
    assert [row["epoch"] for row in history] == list(range(1, EPOCHS + 1))
    for row in history:
        assert row["log D(x)"] < 0 > row["log(1 - D(G(z)))"]
        assert 0 < row["D(x)"] < 1 > row["D(G(z))"] > 0
        assert 0 <= row["confident share"] <= 1 >= row["probe"] > 0.5
    assert [*history[0]][1:5] == nb.LOGGED


def test_a_discriminator_that_wins_stops_the_training(tmp_path, monkeypatch):
    nb = small_problem(tmp_path)
    monkeypatch.setattr(nb, "score", lambda *_: {})
    generator, discriminator = nb.new_gan(seed=0)
    nn.init.constant_(discriminator[-1].bias, 0.0)
    monkeypatch.setattr(nb, "minimax_terms", lambda real, fake: (0 * real.mean(), 0 * fake.mean()))
    with pytest.raises(FloatingPointError, match="toy: the discriminator won by epoch 2"):
        nb.fit("toy", generator, discriminator, seed=0)


def test_training_and_choice_see_no_test_image(tmp_path):
    nb = small_problem(tmp_path)
    del nb.x_test, nb.y_test
    generator, discriminator = nb.new_gan(seed=0)
    assert len(nb.fit("toy", generator, discriminator, seed=0, length=1)) == 1


# Data and rulers


def test_pool_and_validation_are_the_training_images_stratified(nb):
    data = nb.load_mnist()
    assert len(data.x_val) == len(data.x_train) // 6
    together = torch.cat([data.x_pool, data.x_val]).flatten(1).tolist()
    assert sorted(together) == sorted(data.x_train.flatten(1).tolist())
    shares = [torch.bincount(y) / len(y) for y in (data.y_val, data.y_train)]
    assert (shares[0] - shares[1]).abs().max() < 0.01


def test_draws_are_stratified_and_seeded(nb):
    rows = nb.draw_rows(250, seed=0)
    assert len({*rows}) == 250
    shares = [torch.bincount(y, minlength=10) / len(y) for y in (nb.y_pool[rows], nb.y_pool)]
    assert (shares[0] - shares[1]).abs().max() < 0.01
    assert np.array_equal(rows, nb.draw_rows(250, seed=0))
    assert not np.array_equal(rows, nb.draw_rows(250, seed=1))
    assert sorted(nb.y_pool[nb.draw_rows(3, seed=0)].tolist()) == list(range(10))  # at least one of each


def test_frechet_distance_against_scipy(nb):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3000, 8)) @ rng.normal(size=(8, 8))
    b = rng.normal(size=(2000, 8)) @ rng.normal(size=(8, 8)) + 0.5
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert nb.frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-6)
    assert nb.frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)


def test_density_and_coverage_against_loops(nb):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(60, 3)), rng.normal(size=(50, 3)) * 1.5
    inside = np.zeros((50, 60), bool)
    for j, point in enumerate(real):
        radius = sorted(np.linalg.norm(point - other) for i, other in enumerate(real) if i != j)[4]
        inside[:, j] = [np.linalg.norm(sample - point) < radius for sample in fake]
    density, coverage = nb.density_and_coverage(torch.tensor(real), torch.tensor(fake))
    assert density == pytest.approx(inside.sum(1).mean() / 5)
    assert coverage == pytest.approx(inside.any(0).mean())
    assert 0 < coverage < 1
    assert nb.density_and_coverage(torch.tensor(real), torch.tensor(fake) + 100) == (0, 0)


def test_measure_counts_what_is_confidently_a_digit(nb, monkeypatch):
    """A ruler that reads its answer off the first pixels."""

    class Ruler(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    ruler = Ruler(nn.Flatten(), nn.Linear(784, 10, bias=False))
    with torch.no_grad():
        ruler[1].weight.copy_(torch.eye(10, 784))
    monkeypatch.setattr(nb, "ruler", ruler)
    images = torch.full((40, 1, 28, 28), -1.0) + 0.01 * torch.randn(40, 1, 28, 28)
    for row in range(40):
        images[row, 0, 0, row % 4] = 4.3 if row % 2 else 2  # e^5.3 : 9 is more, e^3 : 9 less than 0.95 : 0.05
    found = nb.measure(images, images)
    assert found["confident_share"] == 0.5
    assert (found["digit_share_min"], found["digit_share_max"]) == (0, 0.25)
    assert found["frechet"] == pytest.approx(0, abs=1e-6)


def test_two_sample_test_sees_a_difference_only_where_there_is_one(nb, monkeypatch):
    monkeypatch.setattr(nb, "STEPS", 60)
    halves = nb.x_pool[:1200].chunk(2)
    assert nb.two_sample_test(*halves) == pytest.approx(0.5, abs=0.1)
    assert nb.two_sample_test(halves[0], -halves[1]) > 0.95


def test_shifted_images_are_all_of_the_25_and_no_others(nb):
    image = nb.x_pool[:1]
    moved = nb.shifted(image.expand(2000, -1, -1, -1))
    padded = np.pad(image[0, 0].numpy(), nb.SHIFT, constant_values=-1)
    expected = {padded[i : i + 28, j : j + 28].tobytes() for i, j in itertools.product(range(5), repeat=2)}
    assert {one[0].numpy().tobytes() for one in moved} == expected


def test_interpolation_keeps_its_ends_and_length(nb):
    a, b = torch.nn.functional.normalize(torch.randn(2, 3, 100), dim=2) * 10
    path = nb.interpolate(a, b, 5).view(3, 5, 100)
    torch.testing.assert_close(path[:, 0], a)
    torch.testing.assert_close(path[:, -1], b)
    torch.testing.assert_close(path.norm(dim=2), torch.full((3, 5), 10.0))
    steps = (path[:, 1:] - path[:, :-1]).norm(dim=2)
    torch.testing.assert_close(steps, steps[:, :1].expand(-1, 4), rtol=1e-3, atol=1e-4)


def test_nearest_against_loops(nb):
    points, queries = nb.x_pool[:40], nb.x_val[:5]
    distances, rows = nb.nearest(points, queries)
    for query, distance, row in zip(queries, distances, rows):
        all_of_them = [(((query - point) / 2) ** 2).sum().item() ** 0.5 for point in points]
        assert distance == pytest.approx(min(all_of_them), rel=1e-4)
        assert row == int(np.argmin(all_of_them))


# What the features know


def test_features_are_what_the_last_layer_sees_alone_or_in_company(nb):
    _, discriminator = nb.new_gan(seed=0)
    features = nb.codes(discriminator[:-1], nb.x_val[:20])
    assert features.shape == (20, 8192)
    last = discriminator[-1]
    logits = features @ last.weight.detach().numpy().T + last.bias.detach().numpy()
    np.testing.assert_allclose(logits, nb.infer(discriminator, nb.x_val[:20]).numpy(), atol=1e-4)
    np.testing.assert_allclose(nb.codes(discriminator[:-1], nb.x_val[:1]), features[:1], atol=1e-4)


def test_linear_layer_is_logistic_regression_on_standardised_features(nb):
    rng = np.random.default_rng(0)
    x, y = rng.normal(5, 3, (500, 20)) ** 2, rng.integers(0, 10, 500)
    expected = LogisticRegression(C=0.1, max_iter=1000).fit((x - x.mean(0)) / x.std(0), y)
    found = nb.linear_layer(x, y, C=0.1)
    np.testing.assert_allclose(found[-1].coef_, expected.coef_, atol=1e-3)
    scores = found[-1].coef_ @ ((x - x.mean(0)) / x.std(0)).T + found[-1].intercept_[:, None]  # one affine map
    assert np.array_equal(found.predict(x), scores.argmax(0))


def test_settings_are_chosen_by_the_first_draws_validation_accuracy_alone(nb):
    """Methods whose test accuracy contradicts: right on share of the images, as the setting says."""
    asked = []

    def learn(x, y, draw, val, test):
        asked.append((draw, val, len(x)))

        def classify(images):
            known = {id(nb.x_val): (nb.y_val, val), id(nb.x_test): (nb.y_test, test)}
            labels, share = known.get(id(images), (y, 1.0))
            answer = labels.clone()
            answer[round(share * len(answer)) :] += 1
            return answer

        return classify

    settings = [{"val": 0.5, "test": 0.9}, {"val": 0.8, "test": 0.2}, {"val": 0.8, "test": 0.7}]
    found = nb.study(learn, settings)
    assert found["setting"] == settings[1]
    n = round(0.1 * len(nb.x_train))
    assert asked == [(0, 0.5, n), (0, 0.8, n), (0, 0.8, n), *((draw, 0.8, n) for draw in range(1, nb.DRAWS))]
    assert found["train"] == [1] * nb.DRAWS
    np.testing.assert_allclose(found["val"], 0.8, atol=0.01)
    np.testing.assert_allclose(found["test"], 0.2, atol=0.01)


def test_paired_differences_have_the_standard_error_of_the_mean(nb, monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.9, 0.1, (2, 5))
    monkeypatch.setattr(nb, "METRICS", {"a_draws": a.tolist(), "b_draws": b.tolist()})
    difference, error = nb.paired("a", "b")
    assert difference / error == pytest.approx(scipy.stats.ttest_rel(a, b).statistic)
    assert difference == pytest.approx(100 * (a - b).mean())


def test_fine_tuning_starts_from_the_discriminator_and_leaves_it_as_it_is(nb, monkeypatch):
    _, discriminator = nb.new_gan(seed=0)
    features, started = discriminator[:-1], []
    before = copy.deepcopy(features.state_dict())

    def spy(network, *args):
        started.append(copy.deepcopy(network.state_dict()))
        return train(network, *args)

    train = nb.train_classifier
    monkeypatch.setattr(nb, "train_classifier", spy)
    rows = nb.draw_rows(100, seed=0)
    for pretrained, same_start in ([features], True), (None, False):
        classify = nb.end_to_end(pretrained)(nb.x_pool[rows], nb.y_pool[rows], 0, rate=1e-3, dropout=0.2)
        assert torch.equal(started[-1]["0.weight"], before["0.weight"]) is same_start
        assert classify(nb.x_val).shape == (len(nb.x_val),)
    assert all(torch.equal(value, before[key]) for key, value in features.state_dict().items())


def test_a_network_learns_its_labels(nb, monkeypatch):
    monkeypatch.setattr(nb, "STEPS", 60)
    rows = nb.draw_rows(600, seed=0)
    classify = nb.end_to_end(shifts=True)(nb.x_pool[rows], nb.y_pool[rows], 0, rate=2e-3, dropout=0.0)
    assert nb.accuracy(classify, nb.x_val, nb.y_val) > 0.8


def test_random_network_has_measured_statistics(nb):
    network, x = nb.random_network(), nb.x_train
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            values = x.transpose(0, 1).flatten(1)
            assert torch.corrcoef(torch.stack([layer.running_mean, values.mean(1)]))[0, 1] > 0.95
            break
        x = layer(x)
    assert network[0].weight.std().item() == pytest.approx(math.sqrt(2 / (1 + 0.2**2) / 16), rel=0.1)


def test_autoencoder_reconstructs_better_and_is_trained_once(tmp_path):
    nb = small_problem(tmp_path)
    features, history = nb.train_autoencoder()
    assert [row["epoch"] for row in history] == [1, 2, 3, 4][: nb.AUTOENCODER_EPOCHS]
    assert history[-1]["loss"] < history[0]["loss"]
    assert nb.train_autoencoder()[0] is features
    assert not any(p.requires_grad for p in features.parameters())


# On a GPU


def made_on(device, make):
    """The function that makes a network on the device, as fake networks cannot be moved there."""

    def made(*args, **options):
        with device:
            return make(*args, **options)

    return made


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_everything_stays_on_a_gpu(tmp_path, monkeypatch, bf16):
    """What is trained and what is measured, but for the backward pass, which fake tensors cannot do here."""
    nb = small_problem(tmp_path)
    monkeypatch.setattr(nn.Module, "to", lambda network, *_, **__: network)  # where it is made already
    monkeypatch.setattr(torch, "bincount", lambda x, minlength: torch.ones(minlength))  # they cannot be counted
    with fake_gpu() as rules:
        nb.DEVICE, nb.BF16, nb.STEPS = rules.device, bf16, 2
        nb.x_train = nb.x_pool = nb.x_val = nb.x_test = torch.zeros(128, 1, 28, 28, device=rules.device)
        nb.y_pool = nb.y_val = nb.y_test = torch.zeros(128, dtype=torch.int64, device=rules.device)
        for name in "new_classifier", "new_generator", "new_discriminator":
            setattr(nb, name, made_on(rules.device, getattr(nb, name)))
        nb.ruler, generator, discriminator = nb.new_classifier().eval(), nb.new_generator(), nb.new_discriminator()
        nb.epochs = lambda *args, **options: [1]
        nb.frechet_distance = lambda a, b: (a - b).square().mean().item()  # nor have a covariance
        nb.density_and_coverage = lambda real, fake: (1.0, 1.0)
        nb.draw_rows = lambda *args, **options: np.arange(10)
        nb.linear_layer = lambda x, y, C: SimpleNamespace(score=lambda x, y: 1.0)
        assert nb.fit("toy", generator, discriminator, 0, length=1)[0]["probe"] == 1
        z = nb.draw_z(128, seed=0)
        images = nb.infer(generator, z)
        assert images.device.type == nb.interpolate(z, z, 3).device.type == nb.shifted(images).device.type == "cuda"
        assert nb.two_sample_test(images, nb.x_test) == 1
        assert nb.end_to_end()(nb.x_pool, nb.y_pool, 0, 1e-3, 0.2)(nb.x_val).device.type == "cpu"
        with pytest.raises(RuntimeError, match="device"):
            discriminator(nb.x_val.to("cpu"))


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_no_step_of_training_waits_for_a_copy(tmp_path):
    """Of an epoch on a GPU only the log is copied, however many steps it has."""
    nb, copies = small_problem(tmp_path), []
    nb.epochs, nb.score = lambda *args, **options: [1], lambda *args: {}
    with fake_gpu() as rules:
        nb.DEVICE = rules.device
        for steps in (1, 4):
            with rules.device:
                players = nb.new_generator(), nb.new_discriminator()
            nb.x_train, before = torch.zeros(steps * nb.BATCH, 1, 28, 28, device=rules.device), rules.copies
            nb.fit("toy", *players, 0, length=1)
            copies.append(rules.copies - before)
    assert copies[0] == copies[1]

"""The GAN notebook's definitions, against independent routes."""

import copy
import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import FAULTS, fake_gpu, kill_in_training, load_definitions, poison_training, refused
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

N_TRAIN = 256
FIGURE_1 = {
    "Discriminator": ["28x28x1", "14x14x64", "7x7x128", "4x4x256", "4x4x512", "1"],
    "Generator": ["100", "7x7x256", "14x14x128", "28x28x64", "28x28x32", "28x28x1"],
}


def small_problem(out, seed=0):
    """Definitions with a small data set in place: digits, few samples for the scores, no test images."""
    notebook = load_definitions("hw5_gan", OUT=str(out), DATA="demo", SEED=seed)
    data = notebook["load_data"]("MNIST")
    notebook.update(OUT=str(out), N_QUALITY=500, x_train=data.x_train[:N_TRAIN], y_train=data.y_train[:N_TRAIN])
    notebook.update(data=SimpleNamespace(blobs=data.blobs, mode="demo"), AVERAGE_EVERY=2)
    torch.manual_seed(0)
    classifier = notebook["Classifier"]().to(notebook["DEVICE"]).eval()
    notebook.update(classifier=classifier)
    notebook["train_features"] = notebook["classify"](classifier, notebook["to_input"](data.x_train[:500]))[0]
    return notebook


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    return small_problem(tmp_path_factory.mktemp("out"))


def players_of(notebook):
    """Players, with plain gradient ascent for the discriminator and descent for the generator."""
    networks = notebook["Generator"]().to(notebook["DEVICE"]), notebook["Discriminator"]().to(notebook["DEVICE"])
    return networks, [torch.optim.SGD(n.parameters(), lr=0.1, maximize=n is networks[1]) for n in networks]


def batch_of(notebook, n=16):
    x = notebook["to_input"](notebook["x_train"][:n])
    return x, torch.randn(n, 100, device=notebook["DEVICE"])


@pytest.mark.parametrize(("name", "size"), [("Discriminator", (1, 1, 28, 28)), ("Generator", (1, 100))])
def test_every_shape_of_figure_1(notebook, name, size):
    rows = notebook["layer_shapes"](notebook[name](), torch.zeros(size))
    assert [shape for _, shape, _ in rows] == FIGURE_1[name] == notebook["FIGURE_1"][name.lower()]
    assert {layer for layer, _, _ in rows[1:]} <= {"Conv2d", "ConvTranspose2d", "Linear"}
    parameters = sum(p.numel() for p in notebook[name]().parameters())
    assert sum(count for _, _, count in rows) == parameters


def test_the_probe_sees_8192_features_and_only_the_last_layer_is_gone(notebook):
    discriminator = notebook["Discriminator"]().to(notebook["DEVICE"])
    codes = notebook["backbone_features"](discriminator, notebook["x_train"][:7])
    assert codes.shape == (7, 8192)
    with torch.no_grad():
        logits = discriminator.eval()(notebook["to_input"](notebook["x_train"][:7]))
        rest = torch.tensor(codes).to(logits.device) @ discriminator.linear.weight.T + discriminator.linear.bias
    torch.testing.assert_close(rest, logits)
    assert discriminator.linear.weight.shape == (1, 8192)


def test_loss_in_logits_is_the_formula_in_probabilities(notebook):
    real, fake = torch.randn(2, 1000, 1, dtype=torch.float64) * 3
    d_real, d_fake = 1 / (1 + torch.exp(-real)), 1 / (1 + torch.exp(-fake))
    terms = notebook["minimax_terms"](real, fake)
    torch.testing.assert_close(terms[0], d_real.log().mean())
    torch.testing.assert_close(terms[1], (1 - d_fake).log().mean())
    huge = torch.tensor([[1000.0], [-1000.0]])
    assert all(math.isfinite(term) for term in notebook["minimax_terms"](huge, huge))
    assert sum(notebook["minimax_terms"](torch.zeros(1), torch.zeros(1))).item() == pytest.approx(-math.log(4))


def test_losses_are_the_assignments(notebook):
    players, _ = players_of(notebook)
    generator, discriminator = players
    x, z = batch_of(notebook)
    notebook["PRECISION"] = "fp32"
    for module in discriminator.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0  # so that the same pass can be done twice
    value, non_saturating, log = notebook["play"](players, x, z)
    d_real, d_fake = torch.sigmoid(discriminator(x)), torch.sigmoid(discriminator(generator(z)))
    torch.testing.assert_close(value, d_real.log().mean() + (1 - d_fake).log().mean())
    torch.testing.assert_close(non_saturating, -d_fake.log().mean())
    torch.testing.assert_close(log[:2].sum(), value)
    torch.testing.assert_close(log[2:], torch.stack([d_real.mean(), d_fake.mean()]))


def test_the_assignments_loss_is_the_default(notebook):
    assert notebook["LOSS"] == "minimax"
    assert inspect.signature(notebook["fit"]).parameters["loss"].default == "minimax"
    assert notebook["DROPOUT"] > 0


def test_learning_rate_and_dropout_fade_together(notebook, tmp_path):
    fade = [notebook["fade"](epoch) for epoch in range(1, notebook["EPOCHS"] + 1)]
    half = notebook["EPOCHS"] // 2
    assert fade[:half] == [1] * half
    np.testing.assert_allclose(np.diff(fade[half:]), -2 / notebook["EPOCHS"])
    assert 0 < fade[-1] <= 1 / notebook["EPOCHS"] + 1e-9
    small, used = small_problem(tmp_path), []

    def spy(players, optimizers, average, x, loss, lr, dropout):
        blocks = train_epoch(players, optimizers, average, x, loss, lr, dropout)
        rates = {layer.p for layer in players[1].modules() if isinstance(layer, torch.nn.Dropout2d)}
        used.append(({o.param_groups[0]["lr"] for o in optimizers}, rates))
        return blocks

    train_epoch, small["train_epoch"], small["EPOCHS"] = small["train_epoch"], spy, 2
    small["fit"]("dcgan", 2)
    start = small["LEARNING_RATE"], small["DROPOUT"]
    assert used == [tuple({rate * small["fade"](epoch)} for rate in start) for epoch in (1, 2)]


@pytest.mark.parametrize("loss", ["minimax", "non-saturating"])
def test_each_player_steps_along_its_own_gradient_only(notebook, loss):
    """One plain step against gradients by a separate autograd.grad for each player, from the same forward pass."""
    players, optimizers = players_of(notebook)
    x, z = batch_of(notebook)
    notebook["PRECISION"] = "fp32"
    before = [[p.detach().clone() for p in player.parameters()] for player in players]
    twins = copy.deepcopy(players)
    torch.manual_seed(5)
    value, non_saturating, _ = notebook["play"](twins, x, z)
    loss_g = value if loss == "minimax" else non_saturating
    gradients_g = torch.autograd.grad(loss_g, list(twins[0].parameters()), retain_graph=True)
    gradients_d = torch.autograd.grad(value, list(twins[1].parameters()))
    torch.manual_seed(5)
    notebook["train_step"](players, optimizers, x, z, loss)
    for player, old, gradients, rate in zip(players, before, (gradients_g, gradients_d), (-0.1, 0.1)):
        for p, p_old, gradient in zip(player.parameters(), old, gradients):
            torch.testing.assert_close(p.detach(), p_old + rate * gradient, rtol=1e-4, atol=1e-6)


def test_only_the_discriminator_climbs(notebook):
    _, (optimizer_g, optimizer_d), _ = notebook["make_players"](0.1)
    assert not optimizer_g.defaults["maximize"]
    assert optimizer_d.defaults["maximize"]


def test_average_follows_the_weights_and_gets_its_own_batch_norm_statistics(notebook):
    generator = notebook["Generator"]().to(notebook["DEVICE"])
    average = notebook["AveragedModel"](generator, multi_avg_fn=notebook["get_ema_multi_avg_fn"](0.9))
    expected = None
    for step in range(4):
        with torch.no_grad():
            generator.linear.weight.add_(1.0)
        average.update_parameters(generator)
        now = generator.linear.weight.detach()
        expected = now.clone() if step == 0 else 0.9 * expected + 0.1 * now
    torch.testing.assert_close(average.module.linear.weight.detach(), expected)
    notebook["PRECISION"] = "fp32"
    ready = notebook["averaged_generator"](average)
    assert not ready.training
    torch.testing.assert_close(ready.linear.weight.detach(), expected)
    batches = notebook["draw_z"](2000, seed=2).split(500)
    maps = [(z @ expected.T).view(-1, 256, 49).transpose(0, 1).flatten(1) for z in batches]
    for statistic, values in ("mean", [m.mean(1) for m in maps]), ("var", [m.var(1) for m in maps]):
        expected = torch.stack(values).mean(0)
        torch.testing.assert_close(getattr(ready.layers[0], f"running_{statistic}"), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(average.module.layers[0].running_mean, torch.zeros_like(ready.layers[0].running_mean))


def test_samples_do_not_depend_on_their_company(notebook):
    """In evaluation mode, batch normalisation uses its running statistics, and Dropout is off."""
    generator = notebook["Generator"]().to(notebook["DEVICE"]).train()
    z = notebook["draw_z"](20, seed=0)
    notebook["PRECISION"] = "fp32"
    together, alone = notebook["generate"](generator, z), notebook["generate"](generator, z[:1])
    assert not generator.training
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    discriminator = notebook["Discriminator"]().to(notebook["DEVICE"]).train()
    codes = notebook["backbone_features"](discriminator, notebook["x_train"][:20])
    np.testing.assert_allclose(
        notebook["backbone_features"](discriminator, notebook["x_train"][:1]), codes[:1], atol=1e-5
    )


def test_frechet_distance_against_scipy(notebook):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3000, 8)) @ rng.normal(size=(8, 8))
    b = rng.normal(size=(2000, 8)) @ rng.normal(size=(8, 8)) + 0.5
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert notebook["frechet_distance"](torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-6)
    assert notebook["frechet_distance"](torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)


def test_manifold_share_against_loops(notebook):
    rng = np.random.default_rng(0)
    points, queries = rng.normal(size=(60, 3)), rng.normal(size=(50, 3)) * 1.5
    inside = 0
    for query in queries:
        for i, point in enumerate(points):
            radius = sorted(np.linalg.norm(point - other) for j, other in enumerate(points) if j != i)[2]
            if np.linalg.norm(query - point) <= radius:
                inside += 1
                break
    share = notebook["manifold_share"](torch.tensor(points), torch.tensor(queries))
    assert 0 < inside < 50
    assert share == pytest.approx(inside / 50)


def test_confident_share_counts_from_95_percent(notebook):
    rows = torch.tensor([[0.96, 0.04], [0.04, 0.96], [0.5, 0.5], [0.94, 0.06]])
    assert notebook["confident_share"](rows) == 0.5


def test_interpolation_keeps_its_ends_and_length(notebook):
    a, b = torch.nn.functional.normalize(torch.randn(2, 3, 100), dim=2) * 10
    path = notebook["interpolate"](a, b, 5).view(3, 5, 100)
    torch.testing.assert_close(path[:, 0], a)
    torch.testing.assert_close(path[:, -1], b)
    torch.testing.assert_close(path.norm(dim=2), torch.full((3, 5), 10.0))
    steps = (path[:, 1:] - path[:, :-1]).norm(dim=2)
    torch.testing.assert_close(steps, steps[:, :1].expand(-1, 4), rtol=1e-3, atol=1e-4)


def test_the_labelled_tenth_is_exact_and_stratified(notebook):
    y = torch.arange(10).repeat(6000)[torch.randperm(60000)]
    rows = notebook["labelled_rows"](y, 0.1, 0)
    assert len(set(rows)) == 6000
    assert torch.bincount(y[rows]).tolist() == [600] * 10
    assert np.array_equal(rows, notebook["labelled_rows"](y, 0.1, 0))
    assert not np.array_equal(rows, notebook["labelled_rows"](y, 0.1, 1))
    assert np.array_equal(notebook["labelled_rows"](y, 1, 0), np.arange(60000))


def test_no_test_image_reaches_the_probe_before_it_is_scored(notebook):
    """The layers are the same whatever the test images are, and the backbone is left as it was."""
    discriminator = notebook["Discriminator"]().to(notebook["DEVICE"])
    before = copy.deepcopy(discriminator.state_dict())
    x, y = notebook["x_train"].repeat(2, 1, 1), notebook["y_train"].repeat(2).cpu().numpy()
    codes = notebook["backbone_features"](discriminator, x)[:, :50]
    tests = codes[:9], np.full((9, 50), 1e3)
    results = [notebook["probe_draws"](codes.__getitem__, y, test, y[:9]) for test in tests]
    (C, layers, train, _), (other_C, others, other_train, _) = results
    assert (C, train) == (other_C, other_train)
    for a, b in zip(layers, others):
        assert np.array_equal(a[-1].coef_, b[-1].coef_)
    assert len(layers) == 5
    assert layers[0][-1].coef_.shape == (10, 50)
    assert all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())


def test_probe_is_logistic_regression_on_standardised_features(notebook):
    """Scaling in pieces changes nothing."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(5, 3, (2500, 20)).astype(np.float32) ** 2, rng.integers(0, 10, 2500)
    layer = notebook["linear_layer"](x, y, C=0.1)
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, y)
    np.testing.assert_allclose(layer.decision_function(x), expected.decision_function(x), atol=1e-3)


def test_penalty_is_chosen_on_the_images_left_out(notebook):
    """By hand, on features that overfit; and of penalties that are equally good, the stronger one."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    features = np.eye(3)[labels] @ rng.normal(size=(3, 150)) * 0.3 + rng.normal(size=(400, 150))
    rows = train_test_split(np.arange(400), test_size=0.2, stratify=labels, random_state=notebook["SEED"])
    (x, x_val), (y, y_val) = ([part[r] for r in rows] for part in (features, labels))
    mean, std = x.mean(0), x.std(0)
    models = [LogisticRegression(C=C, max_iter=1000).fit((x - mean) / std, y) for C in notebook["PENALTIES"]]
    scores = [(model.predict((x_val - mean) / std) == y_val).mean() for model in models]
    assert len(set(scores)) > 1
    assert notebook["choose_penalty"](features, labels) == notebook["PENALTIES"][int(np.argmax(scores))]
    assert notebook["choose_penalty"](np.zeros((400, 5)), labels) == notebook["PENALTIES"][0]


def test_training_touches_the_train_split_only(notebook):
    """fit and what it calls know no test image: they work where there is none."""
    assert not {"x_test", "y_test", "test_features"} & notebook.keys()
    for name in ("fit", "train_epoch", "train_step", "play", "score", "averaged_generator", "generate"):
        assert not [used for used in notebook[name].__code__.co_names if "test" in used]


def fit_small(out, epochs=3):
    """Train a small GAN in `out`; returns its weights and history."""
    notebook = small_problem(out)
    generator, average, discriminator, history = notebook["fit"]("dcgan", epochs)
    return {"g": generator.state_dict(), "e": average.state_dict(), "d": discriminator.state_dict()}, history


def same(a, b):
    weights = all(torch.equal(a[0][net][key], b[0][net][key]) for net in a[0] for key in a[0][net])
    samples = all(torch.equal(x["samples"], y["samples"]) for x, y in zip(a[1], b[1]))
    numbers = [[{k: v for k, v in row.items() if k != "samples"} for row in history] for history in (a[1], b[1])]
    return weights and samples and numbers[0] == numbers[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit_small(tmp_path_factory.mktemp("uninterrupted"))


def test_a_killed_run_resumes_to_the_same_numbers(uninterrupted, tmp_path):
    assert 1 <= kill_in_training("test_gan", tmp_path, "dcgan") < 3
    assert same(fit_small(tmp_path), uninterrupted)
    FAULTS["SIGKILL in training (GAN)"] = "the next run goes on where it was, to the same numbers"


def test_training_moves_both_players_and_logs_what_it_says(uninterrupted):
    _, history = uninterrupted
    blocks = np.concatenate([row["blocks"] for row in history])
    assert blocks.shape == (3, 4)
    assert (blocks[:, :2] < 0).all()
    assert ((blocks[:, 2:] > 0) & (blocks[:, 2:] < 1)).all()
    assert history[-1]["samples"].shape == (10, 28, 28)
    assert not torch.equal(history[0]["samples"], history[-1]["samples"])


def test_divergence_stops_with_a_message_and_keeps_the_last_state(tmp_path):
    notebook = small_problem(tmp_path)
    poison_training(notebook, after=4)
    with refused(
        "training diverges (GAN)", FloatingPointError, r"dcgan: training broke down in epoch 2 .*epoch 1 is kept"
    ):
        notebook["fit"]("dcgan", 3)
    assert len(notebook["load_state"](tmp_path / "state" / "dcgan.pt")["history"]) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_everything_stays_on_a_gpu(tmp_path, precision):
    """What is trained and what is measured, but for the backward pass, which fake tensors cannot do here."""
    notebook = load_definitions("hw5_gan", OUT=str(tmp_path), PRECISION=precision)
    with fake_gpu() as rules:
        cuda = rules.device
        notebook.update(DEVICE=cuda, N_QUALITY=500, train_features=torch.zeros(500, 64, dtype=torch.float64))
        with cuda:
            players = generator, discriminator = notebook["Generator"](), notebook["Discriminator"]()
            classifier = notebook["classifier"] = notebook["Classifier"]().eval()
            y = torch.zeros(128, dtype=torch.int64)
        x, z = torch.zeros(128, 28, 28, dtype=torch.uint8, device=cuda), notebook["draw_z"](128, seed=0)
        parts = notebook["play"](players, notebook["to_input"](x), z)
        assert {part.device.type for part in parts} == {"cuda"}
        notebook["frechet_distance"] = lambda a, b: (a - b).square().mean().item()  # fake tensors have no covariance
        assert notebook["score"](generator).keys() == {"confident", "frechet"}
        images = notebook["generate"](generator, z)
        assert images.device.type == "cuda"
        features, probabilities = notebook["classify"](classifier, images)
        assert {features.device.type, probabilities.device.type} == {"cpu"}
        assert notebook["accuracy"](classifier, x, y) == 1
        assert notebook["backbone_features"](discriminator, x).shape == (128, 8192)
        assert notebook["interpolate"](z, z, 3).device.type == "cuda"
        with pytest.raises(RuntimeError, match="device"):
            notebook["play"](players, notebook["to_input"](x.to("cpu")), z)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_no_step_of_training_waits_for_a_copy(tmp_path):
    """Of an epoch on a GPU only the log is copied, and in each update of the average torch's count of them."""
    notebook, copies = load_definitions("hw5_gan", OUT=str(tmp_path)), []
    with fake_gpu() as rules:
        notebook["DEVICE"] = rules.device
        with rules.device:
            players = notebook["Generator"](), notebook["Discriminator"]()
        optimizers = [torch.optim.Adam(player.parameters(), fused=True) for player in players]
        average = notebook["AveragedModel"](players[0], multi_avg_fn=notebook["get_ema_multi_avg_fn"]())
        for steps in (1, notebook["AVERAGE_EVERY"]):
            x, before = torch.zeros(64 * steps, 28, 28, dtype=torch.uint8, device=rules.device), rules.copies
            notebook["train_epoch"](players, optimizers, average, x, "minimax", 5e-4, 0.2)
            copies.append(rules.copies - before)
    assert copies == [4, 5]  # the log has four numbers

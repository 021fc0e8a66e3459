"""The VAE notebook's definitions, against independent routes."""

import math
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAULTS, ROOT, fake_gpu, kill_in_training, load_definitions, poison_training, refused
from jupyter_client.manager import start_new_kernel
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

N_TRAIN, N_VAL = 384, 128


def small_problem(out, epochs=12, seed=0):
    """Definitions with a small data set in place: digits, so that something can be learned."""
    notebook = load_definitions("hw5_vae", OUT=str(out), DATA="demo", EPOCHS=epochs, SEED=seed)
    data = notebook["load_data"]("FashionMNIST")
    notebook["OUT"] = str(out)
    x, y = data.x_train.flatten(1), data.y_train
    validation = slice(N_TRAIN, N_TRAIN + N_VAL)
    notebook.update(x_train=x[:N_TRAIN], y_train=y[:N_TRAIN], x_val=x[validation], y_val=y[validation])
    notebook.update(data=SimpleNamespace(blobs=data.blobs, mode="demo"), AVERAGE_EVERY=2)
    return notebook


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    return small_problem(tmp_path_factory.mktemp("out"))


def test_layers_are_the_templates(notebook):
    vae = {name: tuple(p.shape) for name, p in notebook["VAE"]().named_parameters() if "weight" in name}
    names = ["fc1.weight", "fc21.weight", "fc22.weight", "fc3.weight", "fc4.weight"]
    assert list(vae) == names
    assert list(vae.values()) == [(400, 784), (20, 400), (20, 400), (400, 20), (784, 400)]
    cvae = {name: tuple(p.shape) for name, p in notebook["CVAE"]().named_parameters() if "weight" in name}
    assert list(cvae) == names
    assert list(cvae.values()) == [(400, 794), (20, 400), (20, 400), (400, 30), (784, 400)]
    assert notebook["BATCH"] == 128


def test_terms_against_torch_distributions(notebook):
    logits, x = torch.randn(7, 784) * 3, torch.randint(0, 2, (7, 784)).float()
    mu, logvar = torch.randn(7, 20), torch.randn(7, 20)
    bce, kl = notebook["negative_elbo_terms"](logits, x, mu, logvar)
    expected = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(bce, -Bernoulli(logits=logits).log_prob(x).sum(1))


def test_cross_entropy_of_grey_pixels_is_least_at_the_pixel(notebook):
    x = torch.rand(3, 784).clamp(0.01, 0.99)
    entropy = -(x * x.log() + (1 - x) * (1 - x).log()).sum(1)
    zeros = torch.zeros(3, 20)
    torch.testing.assert_close(notebook["negative_elbo_terms"](torch.logit(x), x, zeros, zeros)[0], entropy)
    other = notebook["negative_elbo_terms"](torch.logit(x) + 0.1 * torch.randn_like(x), x, zeros, zeros)[0]
    assert (other > entropy).all()


def test_loss_is_finite_where_a_sigmoid_saturates(notebook):
    logits = torch.tensor([[200.0, -200.0] * 392])
    x = torch.tensor([[0.0, 1.0] * 392])
    zeros = torch.zeros(1, 20)
    assert notebook["negative_elbo_terms"](logits, x, zeros, zeros)[0].item() == pytest.approx(200 * 784)


def test_elbo_against_brute_force(notebook):
    """E_q[log p(x|z) + log p(z) - log q(z|x)] by plain Monte Carlo over densities, for one image."""
    torch.manual_seed(1)
    model = notebook["CVAE"]().to(notebook["DEVICE"])
    x, c = notebook["x_val"][:1], notebook["y_val"][:1]
    bce, kl = notebook["evaluate"](model, x, c, samples=2000)
    with torch.no_grad():
        pixels = x.float() / 255
        mu, logvar = model.encode(pixels, c)
        q = Normal(mu, torch.exp(0.5 * logvar))
        z = q.sample((20000,))
        p = torch.sigmoid(model.decode(z[:, 0], c.expand(20000)))
        log_p_x = (pixels * p.log() + (1 - pixels) * (1 - p).log()).sum(1)
        terms = -(log_p_x + Normal(0.0, 1.0).log_prob(z).sum((1, 2)) - q.log_prob(z).sum((1, 2)))
    error = (terms.std() / math.sqrt(len(terms))).item()
    assert bce + kl == pytest.approx(terms.mean().item(), abs=6 * error + 1e-3)
    assert error < 0.1


def test_forward_samples_with_the_encoders_mean_and_spread(notebook):
    torch.manual_seed(2)
    model = notebook["VAE"]().to(notebook["DEVICE"])
    model.decode = lambda z, c=None: z  # see z itself
    x = notebook["x_val"][:1].float().expand(20000, -1) / 255
    with torch.no_grad():
        z, mu, logvar = model(x)
    assert torch.allclose(z.mean(0), mu[0], atol=0.05)
    assert torch.allclose(z.std(0), torch.exp(0.5 * logvar[0]), rtol=0.05)


def test_iwae_with_one_sample_is_the_elbo_and_more_samples_tighten_it(notebook):
    torch.manual_seed(3)
    model = notebook["VAE"]().to(notebook["DEVICE"])
    torch.nn.init.normal_(model.fc3.weight, std=1.0)  # so that z matters
    x, c = notebook["x_val"][:100], notebook["y_val"][:100]
    elbo = sum(notebook["evaluate"](model, x, c, samples=200))
    one = np.mean([notebook["iwae_bound"](model, x, c, samples=1, seed=s) for s in range(200)])
    assert one == pytest.approx(elbo, rel=5e-3)
    assert notebook["iwae_bound"](model, x, c, samples=100) < one


def test_iwae_reaches_the_exact_likelihood_where_that_is_known(notebook):
    """A decoder that ignores z has p(x) = p(x|z), whatever q is."""
    model = notebook["VAE"]().to(notebook["DEVICE"])
    torch.nn.init.zeros_(model.fc3.weight)
    torch.nn.init.zeros_(model.fc21.weight)
    torch.nn.init.zeros_(model.fc22.weight)
    torch.nn.init.zeros_(model.fc21.bias)
    torch.nn.init.constant_(model.fc22.bias, math.log(0.9))
    x, c = notebook["x_val"][:50], notebook["y_val"][:50]
    bce, kl = notebook["evaluate"](model, x, c)
    assert kl > 0.05
    assert notebook["iwae_bound"](model, x, c, samples=4000) == pytest.approx(bce, abs=0.02)


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_class_reaches_the_cvaes_encoder_and_decoder_one_hot(notebook, part):
    model = notebook["CVAE"]()
    layer, size = (model.fc1, 784) if part == "encode" else (model.fc3, 20)
    seen = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    value, c = torch.rand(10, size), torch.arange(10)
    getattr(model, part)(value, c)
    assert torch.equal(seen[0][:, :size], value)
    assert torch.equal(seen[0][:, size:], torch.eye(10))


def test_split_is_80_20_stratified_disjoint_and_seeded(notebook):
    y = torch.arange(10).repeat(600)[torch.randperm(6000)]
    fit_rows, val_rows = notebook["split_rows"](y)
    assert sorted([*fit_rows, *val_rows]) == list(range(6000))
    assert torch.bincount(y[fit_rows]).tolist() == [480] * 10
    assert torch.bincount(y[val_rows]).tolist() == [120] * 10
    assert np.array_equal(notebook["split_rows"](y)[1], val_rows)


def test_one_step_learns_and_reaches_every_weight(notebook):
    model = notebook["CVAE"]().to(notebook["DEVICE"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    x, c = notebook["x_train"][:128], notebook["y_train"][:128]
    losses = [notebook["train_step"](model, optimizer, x, c).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_stopping_rule_and_choice_of_weights(notebook):
    scores = [250 - 10 * (1 - 0.9**e) for e in range(1, 121)]
    history = [{"epoch": e, "train": 0.0} for e in range(1, 121)]
    for row, score in zip(history, scores):
        if row["epoch"] % notebook["VALIDATE_EVERY"] == 0:
            row.update({key: score + k for k, key in enumerate(reversed(notebook["WEIGHTS"]))})
    flat = [e for e in range(1, 121) if notebook["is_flat"](history[:e])]
    first = flat[0]
    assert scores[first - notebook["PATIENCE"] - 1] - scores[first - 1] == pytest.approx(0.1, abs=0.06)
    assert flat == list(range(first, 121))
    assert notebook["best_of"](history) == (scores[119], 120, notebook["WEIGHTS"][-1])


def test_divergence_stops_with_a_message_and_keeps_the_last_state(tmp_path):
    notebook = small_problem(tmp_path)
    poison_training(notebook, after=6)
    with refused(
        "training diverges (VAE)", FloatingPointError, r"vae: training broke down in epoch 3 .*epoch 2 is kept"
    ):
        notebook["fit"]("vae", notebook["VAE"])
    assert len(notebook["load_state"](tmp_path / "state" / "vae.pt")["history"]) == 2


def fit_small(out):
    """Train a small C-VAE in `out`; returns its weights and history."""
    notebook = small_problem(out)
    model, history = notebook["fit"]("cvae", notebook["CVAE"])
    return model.state_dict(), history


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][key], b[0][key]) for key in a[0])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit_small(tmp_path_factory.mktemp("uninterrupted"))


def test_two_runs_give_the_same_numbers(uninterrupted, tmp_path):
    assert same(fit_small(tmp_path), uninterrupted)


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_numbers(uninterrupted, tmp_path, by):
    assert 1 <= kill_in_training("test_vae", tmp_path, "cvae", by) < 12
    assert same(fit_small(tmp_path), uninterrupted)
    FAULTS[f"{by.name} in training (VAE)"] = "the next run goes on where it was, to the same numbers"


def test_jupyters_stop_button_is_answered_in_a_line(uninterrupted, tmp_path):
    """In a kernel: the cell counts as failed, so that none follows, no traceback is shown, and nothing is lost."""
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT / "tests"))
    try:
        client.execute(f"from test_vae import fit_small; fit_small({str(tmp_path)!r})")
        while not (tmp_path / "state" / "cvae.pt").exists():
            time.sleep(0.01)
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=60)["content"]["status"] == "error"
        shown, message = [], client.get_iopub_msg(timeout=60)
        while message["content"].get("execution_state") != "idle":
            shown.append((message["msg_type"], message["content"]))
            message = client.get_iopub_msg(timeout=60)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert not [content for kind, content in shown if kind == "error"]
    line = "".join(content["text"] for kind, content in shown if kind == "stream" and content["name"] == "stderr")
    assert "go on" in line
    assert line.count("\n") == 1
    assert same(fit_small(tmp_path), uninterrupted)
    FAULTS["stop button of Jupyter"] = line.strip()


def test_a_damaged_state_is_named(tmp_path):
    os.makedirs(tmp_path / "state")
    (tmp_path / "state" / "cvae.pt").write_bytes(b"not a checkpoint")
    with refused("state of an interrupted run damaged", RuntimeError, r"state/cvae\.pt is damaged .*delete it"):
        fit_small(tmp_path)


def test_aggregate_kl_against_torch_and_samples(notebook):
    rng = np.random.default_rng(0)
    mu, sigma = rng.normal(0.3, 0.7, (4000, 3)) @ rng.normal(size=(3, 3)), rng.uniform(0.2, 0.9, (4000, 3))
    value = notebook["aggregate_kl"](mu, sigma)
    z = torch.tensor(mu + sigma * rng.normal(size=mu.shape))
    fitted = MultivariateNormal(z.mean(0), torch.cov(z.T))
    prior = MultivariateNormal(torch.zeros(3, dtype=z.dtype), torch.eye(3, dtype=z.dtype))
    assert value == pytest.approx(kl_divergence(fitted, prior).item(), rel=0.05)


def test_codes_are_in_order_and_z_is_drawn_from_q(notebook):
    model = notebook["VAE"]().to(notebook["DEVICE"])
    x, c = notebook["x_train"].repeat(4, 1), notebook["y_train"].repeat(4)
    codes = notebook["encode_all"](model, x, c)
    with torch.no_grad():
        mu, logvar = model.encode(x.float() / 255, c)
    np.testing.assert_allclose(codes["mu"], mu.cpu(), atol=1e-5)
    np.testing.assert_allclose(codes["sigma"], torch.exp(0.5 * logvar).cpu(), rtol=1e-4)
    eps = (codes["z"] - codes["mu"]) / codes["sigma"]
    assert abs(eps.mean()) < 0.03
    assert eps.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["VAE", "CVAE"])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_everything_stays_on_a_gpu(tmp_path, precision, model):
    """What is trained and what is measured, but for the backward pass, which fake tensors cannot do here."""
    notebook = load_definitions("hw5_vae", OUT=str(tmp_path), PRECISION=precision)
    with fake_gpu() as rules:
        notebook["DEVICE"] = cuda = rules.device
        with cuda:
            network = notebook[model]()
        x = torch.zeros(128, 784, dtype=torch.uint8, device=cuda)
        c, z = torch.zeros(128, dtype=torch.int64, device=cuda), notebook["draw_prior"](128)
        assert notebook["training_loss"](network, x, c).device.type == "cuda"
        assert notebook["evaluate"](network, x, c) == (1, 1)
        assert notebook["iwae_bound"](network, x, c, samples=2) == -1
        assert notebook["encode_all"](network, x, c)["mu"].shape == (128, 20)
        assert notebook["reconstruct"](network, x, c).device.type == "cuda"
        assert notebook["sample"](network, z, c).device.type == "cuda"
        with pytest.raises(RuntimeError, match="device"):
            notebook["training_loss"](network, x.to("cpu"), c)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_no_step_of_training_waits_for_a_copy(tmp_path):
    """Of an epoch on a GPU only the loss is copied, and in each update of the average torch's count of them."""
    notebook, copies = load_definitions("hw5_vae", OUT=str(tmp_path)), []
    with fake_gpu() as rules:
        notebook["DEVICE"] = cuda = rules.device
        with cuda:
            model = notebook["CVAE"]()
        average = notebook["AveragedModel"](model, multi_avg_fn=notebook["get_ema_multi_avg_fn"]())
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        for steps in (1, 2 * notebook["AVERAGE_EVERY"]):
            n, before = steps * notebook["BATCH"], rules.copies
            notebook["x_train"] = torch.zeros(n, 784, dtype=torch.uint8, device=cuda)
            notebook["y_train"] = torch.zeros(n, dtype=torch.int64, device=cuda)
            notebook["train_epoch"](model, {"EMA": average}, optimizer)
            copies.append(rules.copies - before)
    assert copies == [1, 3]

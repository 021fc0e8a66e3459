"""What holds for the training of every notebook: it learns, repeats itself, survives a kill, and suits a GPU."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import NOTEBOOKS, ROOT, SMALL, fake_gpu, small_problem


def start(nb):
    """What is trained in a notebook, at its start: the middle arguments of its fit()."""
    torch.manual_seed(0)
    return {
        "hw5_gan": lambda: nb.new_gan(seed=0),
        "hw5_rbm": lambda: [nb.new_rbm(8, seed=0, learn_sigma=True), nb.PersistentChains(8)],
        "hw5_vae": lambda: [nb.CVAE().to(nb.DEVICE)],
    }[nb.NAME]()


# Its other arguments.
OPTIONS = {"hw5_gan": {"length": 4, "penalty": 0.5}, "hw5_rbm": {"falls": True, "centred": True}, "hw5_vae": {}}


def fit(notebook, out, **parameters):
    """A small training with seed 0: the weights of what was trained, and the history."""
    fast = {"LEARNING_RATE": 0.03} if notebook == "hw5_rbm" else {}  # so that where its chains are matters at once
    nb = small_problem(notebook, Path(out), **fast | parameters)
    if notebook != "hw5_rbm":  # which follows its test error, and chooses nothing
        del nb.x_test, nb.y_test
    players = start(nb)
    history = nb.fit("toy", *players, seed=0, **OPTIONS[notebook])
    return [player.state_dict() for player in players], history


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(scope="module", params=NOTEBOOKS)
def uninterrupted(request, tmp_path_factory):
    """A notebook's name, and what its small training gives."""
    return request.param, fit(request.param, tmp_path_factory.mktemp("uninterrupted"))


def test_it_learns_and_repeats_itself(uninterrupted, tmp_path):
    notebook, (weights, history) = uninterrupted
    key, factor = {"hw5_gan": ("D(G(z))", 0.9), "hw5_rbm": ("mse_test", 0.95), "hw5_vae": ("raw", 0.9)}[notebook]
    assert history[-1][key] < factor * history[0][key]
    assert history[-1].get("probe", 1) > 0.5  # the GAN's, of 19 labels
    assert all(value.dtype in (torch.float32, torch.int64) for state in weights for value in state.values())
    assert_same(fit(notebook, tmp_path), (weights, history))


def test_killed_anywhere_it_goes_on_to_the_same_numbers(uninterrupted, tmp_path, capsys):
    notebook, expected = uninterrupted
    code = "import torch; torch.accelerator.is_available = lambda: False; import test_training as of; "
    code += f"of.fit({notebook!r}, {str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tests", stdout=subprocess.DEVNULL)
    state = tmp_path / "demo" / "state" / notebook / "toy.pt"
    while not state.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = len(torch.load(state, weights_only=True)["history"])
    assert 1 <= done < SMALL[notebook][0]["EPOCHS"]
    assert_same(fit(notebook, tmp_path), expected)
    assert f"toy: goes on after epoch {done}, from {state}" in capsys.readouterr().out


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_training_that_explodes_is_stopped_and_nothing_of_it_is_kept(notebook, tmp_path):
    with pytest.raises(FloatingPointError, match=r"toy broke down in epoch 1\. Try another SEED"):
        fit(notebook, tmp_path, LEARNING_RATE=1e30, VALIDATE_EVERY=1)
    assert not list(tmp_path.rglob("*.pt"))


def beside(nb, x, c, model, *others):
    """What is computed beside the training, from images x of classes c in a device's memory."""
    if nb.NAME == "hw5_gan":
        images = nb.shifted(nb.infer(model, nb.draw_z(len(x), seed=0)))
        nb.codes(others[0].features, images)
        nb.two_sample_test(images, x)
        nb.by_training(x, c, 0, 1e-3)(x)
    elif nb.NAME == "hw5_vae":
        model.requires_grad_(False)
        nb.iwae_bound(model, x, c, 10)
        nb.codes(model, "test", nb.told_labels("test", "wrong"))
        nb.gaps(model)
    else:
        for rbm, exact in (model, nb.exact_log_z), (nb.new_rbm(20, 0), nb.cd1):
            for negative in nb.cd5, nb.PersistentChains(len(rbm.alpha)), exact:
                with torch.autocast("cuda", torch.bfloat16, enabled=nb.BF16):
                    rbm.free_energy(x).mean() + negative(rbm, x)
            nb.beside_codes(rbm, nb.chain_ends(rbm, x[:2]))
            nb.beside_codes(rbm, nb.sample_hidden(rbm, 4))
            assert rbm.gibbs(x, 2).dtype == torch.float32
            nb.judge(rbm)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_everything_stays_on_a_gpu(notebook, tmp_path, monkeypatch):
    """With bf16 products, on fake tensors, so without the backward pass."""
    short = dict.fromkeys(("STEPS", "GAP_STEPS", "SWEEPS", "CHAIN_LENGTH", "AIS_STEPS"), 2)
    nb = small_problem(notebook, tmp_path, EPOCHS=1, IWAE_SAMPLES=10, **short)
    nb.BF16, nb.epochs, nb.probe_accuracy = True, lambda *_, **__: [1], lambda network: 1.0
    nb.squared_slope = lambda logits, images: logits.mean()  # which is a backward pass
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch, "bincount", lambda x, minlength: torch.ones(minlength))  # fakes cannot be counted
    nb.frechet_distance, nb.density_and_coverage = lambda a, b: 1.0, lambda real, fake: (1.0, 1.0)  # nor compared
    with fake_gpu():
        nb.DEVICE = torch.device("cuda")
        x, c = torch.zeros(128, 784, device="cuda"), torch.zeros(128, dtype=torch.int64, device="cuda")
        x = x.view(128, 1, 28, 28) if notebook == "hw5_gan" else x
        for part in "train", "pool", "val", "test":
            vars(nb).update({f"x_{part}": x, f"y_{part}": c})
        nb.SETS = dict.fromkeys(("train", "val", "test"), (x, c))
        nb.mean_image = nb.spread = torch.ones(784, device="cuda")
        if notebook == "hw5_gan":
            nb.ruler = nb.new_classifier().to("cuda").eval()
        players = start(nb)
        assert len(nb.fit("toy", *players, seed=0, **OPTIONS[notebook])) == 1
        beside(nb, x, c, *players)

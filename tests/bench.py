"""Side-by-side benchmark: each training against the textbook way of writing it, in paired rounds of one run.

The ratio of a round compares two measurements taken one after the other, so a slow moment of the machine
hits both. The table gives the medians over the rounds. The last column is what the notebook's training achieves
of the fastest matrix multiplication measured on the same machine, in the training's own precision. The second
table takes one ingredient of the notebooks' trainings away at a time: how much slower they are without it.

Tried and left out: in the RBM, drawing the Gibbs chain on h alone, which is exact and needs M normals a step instead
of 784. It was 1.8 times as fast at M = 16 and 1.3 times at M = 256, but hides the chain that the assignment asks for.
Half of the RBM's time is random numbers, which PyTorch draws one after the other on a CPU.
"""

import os
import statistics
import struct
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from conftest import load_module
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

ROUNDS = 3


def data_folder(name, scratch):
    """The real data if HW5_DATA or data/ has them, else random images in the same format (same cost)."""
    for folder in (os.environ.get("HW5_DATA", "data"), "data"):
        if (Path(folder) / name / "raw" / "train-images-idx3-ubyte").exists():
            return folder
    rng, raw = np.random.default_rng(0), Path(scratch, name, "raw")
    raw.mkdir(parents=True)
    for part, n in (("train", 60000), ("t10k", 10000)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        images[:, :, :14] = 0  # half of the pixels black, as in the real images
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + images.tobytes())
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels.tobytes())
    return scratch


def pass_over(dataset, step, device):
    """The textbook's pass over a data set: a DataLoader, and each batch of images copied to the device."""
    loader = DataLoader(dataset, batch_size=128, shuffle=True)
    return lambda: sum(step(x.to(device)).item() for x, _ in loader)


def textbook_vae_epoch(notebook, dataset):
    """An epoch as PyTorch's VAE example has it: ToTensor, float32, default Adam."""
    model = notebook["VAE"]().to(notebook["DEVICE"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x):
        x = x.view(-1, 784)
        optimizer.zero_grad()
        logits, mu, logvar = model(x)
        bce = F.binary_cross_entropy(torch.sigmoid(logits), x, reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        loss = (bce + kl) / len(x)
        loss.backward()
        optimizer.step()
        return loss

    return pass_over(dataset, step, notebook["DEVICE"])


def notebook_vae_epoch(notebook, dataset):
    """An epoch of the notebook's own training, its three weight averages included."""
    rows = torch.tensor(dataset.indices)
    notebook["x_train"] = dataset.dataset.data.flatten(1)[rows].to(notebook["DEVICE"]) / 255
    notebook["y_train"] = dataset.dataset.targets[rows].to(notebook["DEVICE"])
    model = notebook["VAE"]().to(notebook["DEVICE"])
    return lambda: notebook["fit"]("one epoch", model, seed=0)


def textbook_rbm_epoch(notebook, dataset):
    """An epoch as the usual RBM template has it, Gaussian visible units put in: ToTensor, float32."""
    rbm = notebook["new_rbm"](256, seed=0)
    W, b, alpha, sigma = rbm.W, rbm.b, rbm.alpha, torch.exp(rbm.log_sigma)
    optimizer = torch.optim.Adam([W, b, alpha], lr=1e-3)

    def free_energy(v):
        quadratic = ((v - b) ** 2 / (2 * sigma**2)).sum(1)
        return (quadratic - F.softplus(F.linear(v / sigma, W, alpha)).sum(1)).mean()

    def step(x):
        v = end = x.view(-1, 784)
        for _ in range(5):
            h = torch.bernoulli(torch.sigmoid(F.linear(end / sigma, W, alpha)))
            mean = b + sigma * F.linear(h, W.t())
            end = mean + sigma * torch.randn_like(mean)
        loss = free_energy(v) - free_energy(end.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return pass_over(dataset, step, notebook["DEVICE"])


def notebook_rbm_epoch(notebook, dataset):
    """An epoch of the notebook's own training, the images already on the device."""
    notebook["x_train"] = dataset.data.flatten(1).float().to(notebook["DEVICE"]) / 255
    rbm = notebook["new_rbm"](256, seed=0)
    return lambda: notebook["fit"]("one epoch", rbm, notebook["cd5"], seed=0)


def textbook_gan_steps(notebook, dataset):
    """Steps as PyTorch's DCGAN example takes them: float32, the players in turn."""
    generator, discriminator = (
        notebook[f"new_{name}"]().to(notebook["DEVICE"]) for name in ("generator", "discriminator")
    )
    options = {"lr": notebook["LEARNING_RATE"], "betas": (0.5, 0.999)}
    optimizer_g, optimizer_d = (torch.optim.Adam(p.parameters(), **options) for p in (generator, discriminator))

    def log_probability(logits):
        return torch.log(torch.sigmoid(logits)).mean()

    def step(x):
        fake = generator(torch.randn(len(x), 100, device=x.device))
        discriminator.zero_grad()
        loss_d = -log_probability(discriminator(x)) - log_probability(-discriminator(fake.detach()))
        loss_d.backward()
        optimizer_d.step()
        generator.zero_grad()
        loss_g = log_probability(-discriminator(fake))
        loss_g.backward()
        optimizer_g.step()
        return loss_d + loss_g

    return pass_over(dataset, step, notebook["DEVICE"])


def notebook_gan_steps(notebook, dataset):
    """As many steps of the notebook's own training, the images already on the device."""
    notebook["x_train"] = notebook["to_input"](dataset.dataset.data[torch.tensor(dataset.indices)]).to(
        notebook["DEVICE"]
    )
    players = notebook["new_gan"](seed=0)
    return lambda: notebook["fit"]("some steps", *players, seed=0)


def seconds(function):
    """Wall-clock seconds of one call, the device's queue emptied."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_peak(notebook, n=2048, times=10):
    """Floating-point operations per second of the fastest of some (n, n) products, in the training's precision."""
    a = torch.randn(n, n, device=notebook["DEVICE"])
    a = a.bfloat16() if notebook["BF16"] else a
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(times))


def operations(function):
    """Floating-point operations of the matrix products and convolutions in one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def compare(label, notebook, textbook, ours):
    """Print a row of the table: median seconds of both, the median of the paired ratios, the share of the peak."""
    work, peak = operations(ours), matmul_peak(notebook)
    pairs = [(seconds(textbook), seconds(ours)) for _ in range(ROUNDS)]
    a, b = (statistics.median(side) for side in zip(*pairs))
    ratio = statistics.median(x / y for x, y in pairs)
    share = f"{work / b / 1e9:.0f} of {peak / 1e9:.0f}"
    print(f"{label:<46} {a:>10.2f} {b:>10.2f} {ratio:>7.1f}x {share:>16}", flush=True)


ADAM = torch.optim.Adam
WITHOUT = {  # an ingredient: the context in which a notebook does without it
    "bf16 products": lambda notebook: patch.dict(notebook, BF16=False),
    "fused Adam": lambda _: patch("torch.optim.Adam", lambda *args, fused, **options: ADAM(*args, **options)),
    "averaging only some steps": lambda notebook: patch.dict(notebook, AVERAGE_EVERY=1),
    "channels-last layout": lambda notebook: patch.dict(notebook, LAYOUT=torch.contiguous_format),
}


def take_away(label, notebook, training, dataset, *ingredients):
    """Time a training without each of the ingredients, beside itself. Returns rows of the second table."""
    rows, ours = [], training(notebook, dataset)
    for ingredient in ingredients:
        with WITHOUT[ingredient](notebook):
            poorer, pairs = training(notebook, dataset), []
            poorer()
        for _ in range(ROUNDS):
            with WITHOUT[ingredient](notebook):
                slow = seconds(poorer)
            pairs.append(slow / seconds(ours))
        rows.append(f"{label + ', without ' + ingredient:<46} {statistics.median(pairs):>6.2f}x")
    return rows


def main():
    with tempfile.TemporaryDirectory() as scratch:
        notebook = vars(load_module("hw5_vae", OUT=scratch))
        notebook.update(epochs=lambda *_, **__: [1], validate=lambda *_: None)  # one epoch, nothing kept or scored
        source = data_folder("FashionMNIST", scratch)
        fashion = datasets.FashionMNIST(source, train=True, transform=transforms.ToTensor())
        part = Subset(fashion, range(48000))
        print(f"{torch.get_num_threads()} threads, {ROUNDS} paired rounds, medians\n")
        print(f"{'':<46} {'textbook s':>10} {'here s':>10} {'ratio':>8} {'GFLOP/s of peak':>16}")
        textbook, ours = textbook_vae_epoch(notebook, part), notebook_vae_epoch(notebook, part)
        compare("VAE, one epoch (48,000 images, batch 128)", notebook, textbook, ours)
        common = "bf16 products", "fused Adam"
        rows = take_away("VAE", notebook, notebook_vae_epoch, part, *common, "averaging only some steps")

        kuzushiji = datasets.KMNIST(data_folder("KMNIST", scratch), train=True, transform=transforms.ToTensor())
        notebook = vars(load_module("hw5_rbm", OUT=scratch))
        images = kuzushiji.data.flatten(1).float() / 255
        notebook.update(mean_image=images.mean(0), spread=images.std(0).clamp(min=notebook["SIGMA_MIN"]), passes=1)
        notebook.update(epochs=lambda *_, **__: [1], watch=lambda *_, **__: {})  # one epoch, nothing kept
        textbook, ours = textbook_rbm_epoch(notebook, kuzushiji), notebook_rbm_epoch(notebook, kuzushiji)
        compare("RBM M = 256, one epoch (60,000 images, CD-5)", notebook, textbook, ours)
        rows += take_away("RBM", notebook, notebook_rbm_epoch, kuzushiji, *common)

        notebook = vars(load_module("hw5_gan", OUT=scratch))
        notebook.update(
            BATCH=128, epochs=lambda *_, **__: [1], score=lambda *_: {}
        )  # one epoch, nothing kept or scored
        scaled = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
        digits = datasets.MNIST(data_folder("MNIST", scratch), train=True, transform=scaled)
        part = Subset(digits, range(20 * 128))
        textbook, ours = textbook_gan_steps(notebook, part), notebook_gan_steps(notebook, part)
        compare("DCGAN, 20 steps (batch 128)", notebook, textbook, ours)
        rows += take_away("DCGAN", notebook, notebook_gan_steps, part, *common, "channels-last layout")
        print(f"\n{'without one ingredient':<46} {'slower':>7}", *rows, sep="\n")


if __name__ == "__main__":
    main()

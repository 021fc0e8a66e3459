"""The choice of device, precision and memory layout, where the hardware is not at hand."""

import numpy as np
import pytest
import torch
from conftest import load_definitions


@pytest.fixture
def notebook(tmp_path):
    return load_definitions("hw5_gan", OUT=str(tmp_path))


@pytest.mark.parametrize(("capability", "units"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_use_bf16_from_ampere_on(notebook, monkeypatch, capability, units):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert notebook["has_bf16_units"](torch.device("cuda")) is units


@pytest.mark.parametrize(("flags", "units"), [("avx2 avx512_bf16", True), ("avx2 avx512f", False), ("bf16", True)])
def test_processors_use_bf16_if_they_have_the_units(notebook, tmp_path, flags, units):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {flags}\n")
    notebook["Path"] = lambda *parts: cpuinfo
    assert notebook["has_bf16_units"](torch.device("cpu")) is units


def test_a_mac_gets_mps_in_single_precision_and_the_layout_it_can_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    notebook = load_definitions("hw5_gan", OUT=str(tmp_path))
    assert notebook["DEVICE"].type == "mps"
    assert notebook["PRECISION"] == "fp32"
    assert notebook["LAYOUT"] is torch.contiguous_format
    assert notebook["RNGS"] == [torch.random, torch.mps]


def test_precision_can_be_set(tmp_path):
    notebook = load_definitions("hw5_gan", OUT=str(tmp_path), PRECISION="fp32")
    with notebook["autocast"]():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    notebook["PRECISION"] = "bf16"
    with notebook["autocast"]():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_peak_memory_is_what_was_held(notebook, monkeypatch):
    notebook["DEVICE"] = torch.device("cpu")
    before = notebook["peak_memory"]()
    held = np.ones(int(1.1e6) * before // 8)
    assert notebook["peak_memory"]() > held.nbytes / 1e6 > before
    notebook["DEVICE"] = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1_234_567_890)
    assert notebook["peak_memory"]() == 1235

"""dequantize_: dense layers that compute what the packed ones do, in a model that saves again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effllm
from effllm.nn import Int4Linear
from effllm.quantization import (
    GptqConfig,
    Granularity,
    KMeansConfig,
    LinearConfig,
    dequantize_,
)

IDS = torch.arange(2 * 24).view(2, 24) * 37 % 97


def test_the_model_computes_the_same_and_saves(llama: Any, tmp_path: Path) -> None:
    group = Granularity.group(32)
    mixture = {
        "*.q_proj": GptqConfig(4, group, static_groups=False),  # permuted inputs
        "*.mlp.*": KMeansConfig(3, group),
        "*": LinearConfig(4, group, False),
    }
    effllm.quantize_(llama, mixture, calibration=IDS, progress=False)
    expected = llama(IDS).logits
    with pytest.raises(Exception, match=r"effllm\.save"):
        llama.save_pretrained(tmp_path / "packed")
    assert dequantize_(llama) is llama
    assert all(type(m) is nn.Linear for n, m in llama.named_modules() if n.endswith("_proj"))
    torch.testing.assert_close(llama(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    llama.save_pretrained(tmp_path / "dense")
    loaded = effllm.load(tmp_path / "dense", progress=False)
    assert torch.equal(loaded(IDS).logits, llama(IDS).logits)


def test_dtype_bias_mode_and_shared_layers() -> None:
    linear = nn.Linear(64, 64)
    model = nn.Sequential(linear, nn.Sequential(linear), nn.Linear(64, 32, bias=False))
    model[2].eval()
    effllm.quantize_(model, LinearConfig(4), progress=False)
    packed = model[0]
    dequantize_(model, torch.float64)
    assert model[0].weight.dtype == torch.float64
    assert torch.equal(model[0].weight, packed.weight.double())
    assert model[0].bias is packed.bias
    assert model[1][0] is model[0]
    assert model[2].bias is None
    assert (model[0].training, model[2].training) == (True, False)
    with pytest.raises(ValueError, match="the model itself is a quantised layer"):
        dequantize_(Int4Linear(64, 64))

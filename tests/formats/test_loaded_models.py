"""A loaded model is a plain one: copied, pickled, cast and restored, but saved by us alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bytes_zoo import Blockwise, Bytes
from formats_zoo import Zoo, write_checkpoint
from tiny_models import IDS, logits
from torch import nn

import effllm
from effllm.nn.packed_linear import PackedLinear

UP = "model.layers.0.mlp.up_proj"
BF16 = torch.bfloat16

PACKED = [
    Zoo("gptq_v2", shuffled=True, bias=True, shards=3),
    Zoo("awq", tied=True, shards=2),
    Blockwise("nf4", nested=True, bias=True, shards=2),
    Blockwise("fp4", dtype=BF16, head=True, tied=True, shards=3),
]


Loaded = Callable[[], Any]


@pytest.fixture(params=PACKED, ids=lambda kind: kind.id)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> Loaded:
    """Loads the same checkpoint each time, dense parts in fp32."""
    write_checkpoint(tmp_path / "loaded", request.param)
    return lambda: effllm.load(tmp_path / "loaded", dtype=torch.float32, progress=False)


def test_copies_and_pickles(loaded: Loaded) -> None:
    model = loaded()
    expected = logits(model)
    assert isinstance(model.get_submodule(UP), PackedLinear)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    assert not hasattr(model.config, "quantization_config")


def test_state_dicts(loaded: Loaded) -> None:
    model, other = loaded(), loaded()
    expected = logits(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other), expected)
    for part in model.get_submodule(UP).quantised:
        state = model.state_dict()
        if state.pop(f"{UP}.{part}", None) is None:
            continue  # zeros and perm that the layer does not have
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=rf"{UP}: an? \w+4Linear .* loads \["):
                other.load_state_dict(state, strict=strict)


def test_the_meta_device_and_back(loaded: Loaded) -> None:
    model = loaded()
    meta = copy.deepcopy(model).to("meta")
    assert meta(IDS.to("meta")).logits.shape == logits(model).shape
    meta.load_state_dict(model.state_dict(), assign=True)
    meta.model.rotary_emb = model.model.rotary_emb  # its buffers are in no state dict
    assert torch.equal(logits(meta), logits(model))


def test_a_cast_keeps_codes_and_scales(loaded: Loaded) -> None:
    model = loaded()
    half = copy.deepcopy(model).to(BF16)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            for part in module.quantised:
                before, after = getattr(module, part), getattr(half.get_submodule(name), part)
                assert (before is None) == (after is None)
                if before is not None:
                    assert torch.equal(before, after), name
                    assert before.dtype == after.dtype, name
    assert half.model.norm.weight.dtype == BF16
    assert torch.isfinite(logits(half)).all()
    assert half.half().float() is half  # transformers refuses it for quantised models of its own


def test_save_pretrained_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    """It would write packed tensors under a config without a word of them."""
    model = loaded()
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"use effllm\.save\(model, path\)"):
            each.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_save_pretrained_of_a_model_quantised_in_place_is_refused(
    llama: Any, tmp_path: Path
) -> None:
    effllm.quantize_(llama, effllm.Int4Config(32), progress=False)
    with pytest.raises(ValueError, match=r"use effllm\.save\(model, path\)"):
        llama.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))
    effllm.save(llama, tmp_path / "right")
    assert effllm.load(tmp_path / "right", progress=False).effllm_report.layers


def test_save_pretrained_of_a_gguf_file_is_refused(llama: Any, tmp_path: Path) -> None:
    effllm.save(llama, tmp_path / "a.gguf", "gguf-q4_0", progress=False)
    model = effllm.load(tmp_path / "a.gguf", progress=False)
    with pytest.raises(ValueError, match=r"use effllm\.save\(model, path\)"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind", [None, Bytes("fp8", strategy="block")])
def test_save_pretrained_of_dense_models(kind: Any, llama: Any, tmp_path: Path) -> None:
    """Where all layers are dense, whether they were stored so or have been expanded."""
    if kind is None:
        llama.save_pretrained(tmp_path / "a")
    else:
        write_checkpoint(tmp_path / "a", kind)
    model = effllm.load(tmp_path / "a", progress=False)
    model.save_pretrained(tmp_path / "b")
    again = effllm.load(tmp_path / "b", progress=False)
    assert all(type(m) is nn.Linear for m in again.modules() if hasattr(m, "in_features"))
    assert torch.equal(logits(again), logits(model))

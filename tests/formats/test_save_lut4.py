"""effllm.save of NF4 and FP4 layers: the tensors that bitsandbytes has, and what it cannot hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bytes_zoo import Blockwise
from formats_zoo import write_checkpoint, write_tensors
from safetensors.torch import load_file
from tiny_models import logits
from torch import nn

import effllm
from effllm.cli import main
from effllm.formats.bitsandbytes import FP4, encode, quant_type
from effllm.nn import Lut4Linear
from effllm.quantization.codebook import NF4

BF16 = torch.bfloat16

# What the codes 0..7 stand for; 8..15 are the same with a minus.
FP4_TWELFTHS = [0, 1 / 16, 8, 12, 4, 6, 2, 3]


def lut4(model: Any, codebook: torch.Tensor | str = "nf4", group_size: int = 32) -> Any:
    """The model, all layers but the head with this codebook."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, Lut4Linear.from_linear(module, group_size, codebook))
    return model


def written(folder: Path, kind: Blockwise) -> dict[str, torch.Tensor]:
    """A checkpoint with the codebook that it should have; returns its tensors."""
    result = write_checkpoint(folder, kind)
    tensors = dict(result.tensors)
    values = torch.tensor(NF4 if kind.format == "nf4" else FP4)
    for name in tensors:
        if name.endswith("quant_map") and "nested" not in name:
            tensors[name] = values.clone()
    write_tensors(folder, tensors)
    return tensors


@pytest.mark.parametrize(
    "kind",
    [
        Blockwise("nf4"),
        Blockwise("nf4", nested=True, bias=True, dtype=BF16, head=True, tied=True),
        Blockwise("fp4", storage=BF16, tied=True, intermediate=128),
        Blockwise("fp4", blocksize=128, intermediate=128, shards=2),
    ],
    ids=lambda kind: kind.id,
)
def test_there_and_back(kind: Blockwise, tmp_path: Path) -> None:
    before = written(tmp_path / "a", kind)
    assert main(["convert", *map(str, (tmp_path / "a", tmp_path / "b"))]) == 1
    arguments = ["convert", *map(str, (tmp_path / "a", tmp_path / "b")), "--format", "bitsandbytes"]
    assert main(arguments) == 0
    model = effllm.load(tmp_path / "a", progress=False)
    again = effllm.load(tmp_path / "b", progress=False)
    assert torch.equal(logits(again), logits(model))
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    after = load_file(tmp_path / "b" / "model.safetensors")
    if kind.storage == torch.uint8 and not kind.nested and kind.blocksize == 64:
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            if "quant_state" not in name:
                assert torch.equal(after[name], tensor), name
            else:
                found, expected = (json.loads(bytes(t.tolist())) for t in (after[name], tensor))
                assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_layers_of_our_own(codebook: str, dtype: torch.dtype, llama: Any, tmp_path: Path) -> None:
    """A rounded codebook is written as what it is rounded from, which changes no product."""
    table: Any = "nf4" if codebook == "nf4" else torch.tensor(FP4).to(dtype)
    model = lut4(llama.to(dtype), table)
    effllm.save(model, tmp_path / "c", "bitsandbytes", progress=False)
    config = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == codebook
    assert config["bnb_4bit_compute_dtype"] == str(dtype).removeprefix("torch.")
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    again = effllm.load(tmp_path / "c", progress=False)
    model.model.rotary_emb = again.model.rotary_emb  # rounded by the cast above
    assert torch.equal(logits(again), logits(model))
    name = "model.layers.0.mlp.up_proj"
    ours, theirs = model.get_submodule(name), again.get_submodule(name)
    assert torch.equal(ours.qweight, theirs.qweight)
    assert torch.equal(ours.scales.float(), theirs.scales)
    assert theirs.codebook.tolist() == torch.tensor(NF4 if codebook == "nf4" else FP4).tolist()


def test_codebooks() -> None:
    expected = [value / 12 for value in FP4_TWELFTHS]
    assert list(FP4) == [*expected, *(-value for value in expected)]
    for dtype in (torch.float32, torch.float16, BF16):
        assert quant_type(torch.tensor(NF4).to(dtype)) == "nf4"
        assert quant_type(torch.tensor(FP4).to(dtype)) == "fp4"
    for wrong in (torch.tensor(NF4).flip(0), torch.tensor(NF4).expand(3, 16), torch.rand(16)):
        with pytest.raises(ValueError, match="holds the codebooks of NF4 and FP4 only"):
            quant_type(wrong)


def test_groups_of_32_are_joined_where_they_can_be() -> None:
    """Blocks run through the flattened weight, so that some span two rows."""
    codes = torch.randint(0, 16, (3, 96), dtype=torch.uint8)
    for scales, blocks in (
        (torch.arange(9.0).view(3, 3), range(9)),
        (torch.tensor([[1.0, 1, 2], [2, 3, 3], [4, 4, 5]]), range(1, 6)),
        (torch.tensor([[1.0, 1, 2], [3, 3, 4], [4, 5, 5]]), [1, 1, 2, 3, 3, 4, 4, 5, 5]),
    ):
        tensors = encode(codes, torch.tensor(NF4), scales, 32, BF16)
        assert tensors["weight.absmax"].tolist() == list(blocks)
        state = json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"].tolist()))
        size = 64 if len(blocks) == 5 else 32
        assert (state["blocksize"], state["shape"], state["dtype"]) == (size, [3, 96], "bfloat16")
        first, second = (tensors["weight"].flatten() >> shift & 15 for shift in (4, 0))
        assert torch.equal(torch.stack((first, second), -1).view(3, 96), codes)


def test_what_bitsandbytes_does_not_hold(llama: Any, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            effllm.save(llama, tmp_path / "c", "bitsandbytes", progress=False)
        assert not (tmp_path / "c").exists()

    refused("the model has no Lut4Linear; use model.save_pretrained")
    lut4(llama)
    up = llama.model.layers[1].mlp
    dense = nn.Linear(64, 96, bias=False)
    for layer, message in (
        (Lut4Linear.from_linear(dense, 32, torch.rand(16)), "up_proj': .* NF4 and FP4 only"),
        (Lut4Linear.from_linear(dense, 32, torch.tensor(FP4)), r"one codebook, the model has nf4"),
        (Lut4Linear(64, 96, bias=False, codebook_per="row"), "up_proj': .* one per weight"),
        (
            Lut4Linear.from_linear(dense, 32, torch.tensor(NF4), scaled=False),
            "up_proj': .* got no scales",
        ),
        (Lut4Linear.from_linear(dense, 128), "up_proj': .* that divide K, got 128 for K = 64"),
        (effllm.nn.Int4Linear.from_linear(dense, 32), "up_proj': bitsandbytes holds no Int4Linear"),
    ):
        up.up_proj = layer
        refused(message)

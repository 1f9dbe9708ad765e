"""Files with codes of a byte, and of bitsandbytes, that do not fit: which error says what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bytes_zoo import Blockwise, Bytes, Int8, Kind, Sparse, sparsity_config
from formats_zoo import edit_config, write_checkpoint, write_tensors

import effllm
from effllm.formats import CheckpointError, inspect

Q = "model.layers.1.self_attn.q_proj"

Change = Callable[[torch.Tensor], torch.Tensor | None]
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> torch.Tensor:
    values = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [64, 64]}
    return torch.tensor(list(json.dumps(values | changes).encode())).byte()


@pytest.mark.parametrize(
    ("kind", "part", "change", "message"),
    [
        (Bytes(), "weight_scale", None, r"weight_scale' is missing"),
        (Bytes(), "weight_scale", lambda t: t[1:], r"must be F16 .* \[64, 1\], got F16 \[63, 1\]"),
        (Bytes(), "weight_scale", lambda t: t.int(), r"\[64, 1\], got I32 \[64, 1\]"),
        (Bytes(), "weight_scale", lambda t: t * torch.nan, "must be finite, got NaN"),
        (
            Bytes(),
            "weight",
            lambda t: t[:, 1:],
            r"a weight \[N, K\] = \[64, 64\], got one of \[64,",
        ),
        (Bytes(), "weight", lambda t: t.view(torch.int8), "a non-empty F8_E4M3 matrix, got I8"),
        (Bytes(), "weight", lambda t: t.flatten(), r"F8_E4M3 matrix, got F8_E4M3 \[4096\]"),
        (Bytes(), "weight", lambda t: torch.full_like(t, torch.nan), "weights must be finite"),
        (Bytes(), "weight", None, r"tensor '.*q_proj\.weight' is missing"),
        (
            Bytes("int-quantized", floats=False, symmetric=False),
            "weight_zero_point",
            None,
            "weight_zero_point' is missing",
        ),
        (
            Bytes("int-quantized", floats=False, symmetric=False),
            "weight_zero_point",
            lambda t: t[1:],
            r"must be I8 \[64, 1\], got I8 \[63, 1\]",
        ),
        (Bytes(strategy="block"), "weight_scale", lambda t: t[1:], r"\[2, 2\], got F16 \[1, 2"),
        (Bytes("fp8", strategy="block"), "weight_scale_inv", None, "weight_scale_inv' is missing"),
        (
            Bytes("fp8", strategy="tensor"),
            "weight_scale_inv",
            lambda t: t.expand(2),
            r"\[1\], got F16 \[2\]",
        ),
        (
            Bytes("fp8", strategy="block", exponents=torch.uint8),
            "weight_scale_inv",
            lambda t: torch.full_like(t, 255),
            "weights must be finite, got NaN",
        ),
        (Sparse(), "bitmask", None, "bitmask' is missing"),
        (Sparse(), "bitmask", lambda t: t[1:], r"must be U8 \[64, 8\], got U8 \[63, 8\]"),
        (Sparse(), "bitmask", lambda t: t | 1, r"one bit for each of 2048 values, got 2\d\d\d"),
        (Sparse(), "compressed", lambda t: t.int(), "must be F16 or BF16 or F32"),
        (Sparse(), "compressed", lambda t: t * torch.nan, "weights must be finite"),
        (Sparse(), "compressed", None, r"tensor '.*q_proj\.weight' is missing"),
        (Sparse(), "shape", None, "shape' is missing"),
        (Sparse(), "shape", lambda t: t.float(), "must be I64 or I32"),
        (Sparse(), "shape", lambda t: -t, r"shape' must be positive, got \[-64, -64\]"),
        (Sparse(), "shape", lambda t: t + 8, r"\[N, K\] = \[64, 64\], got one of \[72, 72\]"),
        (Bytes(sparsity="sparse-24-bitmask"), "compressed", lambda t: t.half(), "must be F8_E4M3"),
        (Blockwise(), "weight.absmax", None, r"weight\.absmax' is missing"),
        (Blockwise(), "weight.absmax", lambda t: t[1:], r"\[64\], got F32 \[63\]"),
        (Blockwise(), "weight.quant_map", lambda t: t[1:], r"\[16\], got F32 \[15\]"),
        (Blockwise(), "weight", lambda t: t[1:], r"\[2048, 1\], got U8 \[2047, 1\]"),
        (Blockwise(), "weight", lambda t: t.to(torch.int64), "2048 bytes of codes, got I64"),
        (Blockwise(nested=True), "weight.nested_absmax", None, "nested_absmax' is missing"),
        (Blockwise(nested=True), "weight.absmax", lambda t: t.float(), "must be U8"),
        (Int8(), "SCB", None, "SCB' is missing"),
        (Int8(), "SCB", lambda t: t[1:], r"\[64\], got F32 \[63\]"),
        (Int8(), "weight_format", lambda t: t + 1, r"weight_format must be 0 \(rows\), got 1"),
    ],
    ids=lambda value: value.id if isinstance(value, Kind) else None,
)
def test_tensors_that_do_not_fit(
    kind: Any, part: str, change: Change | None, message: str, tmp_path: Path
) -> None:
    written = write_checkpoint(tmp_path, kind)
    tensors = dict(written.tensors)
    old = tensors.pop(f"{Q}.{part}")
    if change is not None:
        tensors[f"{Q}.{part}"] = change(old).contiguous()
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        effllm.load(tmp_path, progress=False)
    assert str(tmp_path) in str(error.value)
    assert Q in str(error.value)


def test_zero_points_of_wrong_scales(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, Bytes("int-quantized", floats=False, symmetric=False))
    parts = (f"{Q}.weight_scale", f"{Q}.weight_zero_point")
    write_tensors(tmp_path, written.tensors | {part: written.tensors[part][1:] for part in parts})
    with pytest.raises(CheckpointError, match=r"weight_scale' must be .* \[64, 1\], got F16 \[63,"):
        effllm.load(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (torch.tensor([123]).byte(), "quant_state must be JSON"),
        (torch.tensor([255, 1]).byte(), "quant_state must be JSON"),
        (torch.tensor(list(b"[" * 9000)).byte(), "quant_state must be JSON"),
        (torch.zeros(10_001).byte(), "at most 10000 bytes of text, got U8"),
        (torch.zeros(2, 2).byte(), r"bytes of text, got U8 \[2, 2\]"),
        (torch.zeros(2), r"must be U8 \[2\], got F32 \[2\]"),
        (torch.tensor(list(b"[]")).byte(), "must be an object, got list"),
        (state(quant_type="fp4"), "quant_type must be 'nf4', got 'fp4'"),
        (state(shape=[64]), r"shape must be \[N, K\], got \[64\]"),
        (state(shape=[64, -64]), "shape must be a positive integer, got -64"),
        (state(shape=[64, 10**30]), "shape must be a positive integer, got 1000"),
        (state(shape=[64, 65]), r"a weight \[N, K\] = \[64, 64\], got one of \[64, 65\]"),
        (state(blocksize=0), "blocksize must be a positive integer, got 0"),
        (state(blocksize=True), "blocksize must be a positive integer, got True"),
        (state(blocksize=32), r"\[128\], got F32 \[64\]"),
        (state(nested_blocksize="x"), "nested_blocksize must be a positive integer, got 'x'"),
        (state(nested_offset="x"), "nested_offset must be a finite number, got 'x'"),
        (state(nested_offset=float("nan")), "nested_offset must be a finite number, got nan"),
    ],
)
def test_quant_states(text: torch.Tensor, message: str, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, Blockwise())
    write_tensors(tmp_path, written.tensors | {STATE: text})
    with pytest.raises(CheckpointError, match=message) as error:
        effllm.load(tmp_path, progress=False)
    assert Q in str(error.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Bytes("fp8"), {"fmt": "e5m2"}, "FP8 of fmt 'e5m2' is not supported"),
        (Bytes("fp8"), {"expert_dtype": "fp4"}, "expert_dtype 'fp4' is not supported"),
        (Bytes("fp8"), {"weight_block_size": [128]}, "weight_block_size must be two positive int"),
        (Bytes("fp8"), {"weight_block_size": [0, 128]}, "weight_block_size must be two positive"),
        (Bytes("fp8"), {"weight_block_size": 128}, "weight_block_size must be two positive integ"),
        (Bytes("fp8"), {"weight_block_size": [True, 1]}, "weight_block_size must be two positive"),
        (Bytes("fp8"), {"quant_method": "awq", "bits": 4}, "group_size must be -1 or positive"),
        (Blockwise(), {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type 'int4' is not supp"),
        (
            Blockwise(),
            {"bnb_4bit_quant_type": "fp4"},
            r"disagrees with .*config\.json \(format fp4",
        ),
        (Blockwise(), {"load_in_4bit": False}, "bitsandbytes without load_in_4bit or load_in_8bit"),
        (Blockwise(), {"load_in_4bit": 1}, "load_in_4bit must be true or false, got 1"),
        (Sparse(), {"sparsity_config": {"format": "dense"}}, "disagrees with .*config"),
        (Sparse(), {"sparsity_config": {}}, "config_groups must be an object, got None"),
        (Sparse(), {"sparsity_config": {"format": "marlin-24"}}, "format 'marlin-24' is not supp"),
        (Bytes(), {"quantization_status": "frozen"}, None),
        (Bytes(), {"sparsity_config": sparsity_config("sparse-24-bitmask")}, None),
        (Int8(), {"load_in_8bit": False, "load_in_4bit": True}, r"disagrees with .*\(format fp4\)"),
    ],
    ids=lambda value: value.id if isinstance(value, Kind) else None,
)
def test_configs(kind: Any, changes: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, kind)
    edit_config(tmp_path, **changes)
    if message is None:
        assert inspect(tmp_path)
        return
    with pytest.raises(CheckpointError, match=message):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_structure": "32x48"}, None),
        ({"block_structure": "32x"}, "block_structure must be two positive integers, got '32x'"),
        ({"block_structure": None}, "block_structure must be two positive integers, got None"),
        ({"strategy": "attn_head"}, "strategy 'attn_head' is not supported"),
        ({"num_bits": 4}, "num_bits = 4 is not supported"),
        ({"type": "complex"}, "weights of type 'complex' is not supported"),
        ({"symmetric": False}, "a zero point of e4m3 weights is not supported"),
    ],
)
def test_groups_of_compressed_tensors(
    changes: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    kind = Bytes(strategy="block")
    write_checkpoint(tmp_path, kind)
    groups = kind.quantization_config()["config_groups"]
    groups["group_0"]["weights"].update(changes)
    edit_config(tmp_path, config_groups=groups)
    if message is None:
        assert inspect(tmp_path)
        return
    with pytest.raises(CheckpointError, match=message):
        inspect(tmp_path)

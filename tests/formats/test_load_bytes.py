"""Formats with codes of a byte, and bitsandbytes: what is loaded, bit for bit, and what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bytes_zoo import Blockwise, Bytes, Int8, Kind, Sparse, sparsity_config
from formats_zoo import edit_config, write_checkpoint, write_tensors
from torch import nn

import effllm
from effllm.formats import CheckpointError, inspect, scaled
from effllm.formats.bitsandbytes import kernel_group_size
from effllm.integrations import use_quantizer
from effllm.nn import Lut4Linear

IDS = torch.tensor([[1, 5, 9, 2, 70, 33, 8, 21]])
Q = "model.layers.1.self_attn.q_proj"
BF16 = torch.bfloat16

KINDS: list[Kind] = [
    Bytes(strategy="tensor"),
    Bytes(strategy="tensor", static=True, dtype=BF16, bias=True, tied=True),
    Bytes(strategy="channel", intermediate=91, dtype=BF16),
    Bytes(strategy="block", intermediate=91),
    Bytes(strategy="block", dtype=BF16, head=True, tied=True, shards=2),
    Bytes("int-quantized", floats=False),
    Bytes("int-quantized", floats=False, symmetric=False, intermediate=91, bias=True),
    Bytes("int-quantized", floats=False, strategy="tensor", symmetric=False, tied=True),
    Bytes("naive-quantized", floats=False, strategy="group", symmetric=False, dtype=BF16),
    Bytes("naive-quantized", floats=False, bits=4, strategy="block", symmetric=False),
    Bytes("naive-quantized", strategy="group"),
    Bytes("fp8", strategy="block", dtype=torch.float32, bias=True),
    Bytes("fp8", strategy="block", dtype=BF16, intermediate=91, tied=True),
    Bytes("fp8", strategy="block", exponents=torch.uint8),
    Bytes("fp8", strategy="block", exponents=torch.float8_e8m0fnu, intermediate=91),
    Bytes("fp8", strategy="tensor", static=True),
    Bytes("fp8", strategy="tensor", name="weight_scale", tied=True),
    Sparse(),
    Sparse(dtype=BF16, bias=True, tied=True, intermediate=92),
    Sparse("sparse-bitmask", intermediate=91),
    Bytes(sparsity="sparse-24-bitmask", dtype=BF16, bias=True),
    Bytes(strategy="block", sparsity="sparse-bitmask", intermediate=91, shards=2),
    Bytes("int-quantized", floats=False, sparsity="sparse-24-bitmask", tied=True, head=True),
    Blockwise("nf4"),
    Blockwise("nf4", nested=True, bias=True, dtype=BF16),
    Blockwise("nf4", nested=True, intermediate=91, tied=True),
    Blockwise("nf4", storage=BF16, head=True, tied=True, shards=2),
    Blockwise("fp4", blocksize=128, dtype=BF16),
    Blockwise("fp4", blocksize=256, nested=True, bias=True),
    Blockwise("fp4", blocksize=4096, intermediate=128),
    Int8(),
    Int8(bias=True, intermediate=91, dtype=BF16),
    Int8(tied=True, head=True),
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_loads_what_was_stored(kind: Any, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, kind)
    model = effllm.load(tmp_path, dtype=torch.float32, progress=False)
    report = {row.name: row for row in model.effllm_report.layers}
    for name, weight in written.weights.items():
        module = model.get_submodule(name)
        assert torch.equal(module.weight, weight.dense), name
        packed = isinstance(module, Lut4Linear)
        assert packed == (report[name].kernel == "lut4_gemm"), name
        assert packed or type(module) is nn.Linear, name
        assert (report[name].format, report[name].bits) == (kind.format, kind.bits)
    for name, parameter in written.dense.named_parameters():
        if name.removesuffix(".weight") not in written.weights:
            assert torch.equal(model.get_parameter(name), parameter), name
    tied = kind.tied and not kind.head
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(model), logits(written.dense), rtol=1e-4, atol=1e-4)
    on_disk = inspect(tmp_path)
    for row in on_disk.layers:
        if row.name in written.weights:
            assert replace(row, bytes=0) == replace(report[row.name], bytes=0)
    assert on_disk.bytes == sum(tensor.nbytes for tensor in written.tensors.values())


@pytest.mark.parametrize(
    "kind",
    [
        Bytes(strategy="block", static=True, bias=True),
        Bytes("int-quantized", floats=False, symmetric=False, tied=True),
        Blockwise("nf4", nested=True, bias=True),
        Blockwise("fp4", storage=BF16, head=True, tied=True),
        Int8(intermediate=91),
        Sparse(dtype=BF16, tied=True),
        Bytes(sparsity="sparse-24-bitmask", bias=True),
    ],
    ids=lambda kind: kind.id,
)
def test_from_pretrained(kind: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    write_checkpoint(tmp_path, kind)
    use_quantizer("always")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        use_quantizer("missing")
    expected = effllm.load(tmp_path, progress=False)
    assert torch.equal(logits(model), logits(expected))
    assert model.effllm_report == expected.effllm_report


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Bytes(strategy="block"), (8, 48, "dense (e4m3 codes)")),
        (Bytes("int-quantized", floats=False), (8, 64, "dense (8-bit codes)")),
        (Bytes("fp8", strategy="block"), (8, 48, "dense (e4m3 codes)")),
        (Blockwise("nf4"), (4, 64, "lut4_gemm")),
        (Int8(), (8, 64, "dense (8-bit codes)")),
        (Sparse(), (16, 64, "dense (sparse-24-bitmask)")),
        (Bytes(sparsity="sparse-24-bitmask"), (8, 64, "dense (e4m3 codes)")),
    ],
    ids=lambda value: value.id if isinstance(value, Kind) else "",
)
def test_reports(kind: Any, expected: tuple[int, int, str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, kind)
    row = next(row for row in inspect(tmp_path).layers if row.name == Q)
    assert (row.format, row.bits, row.group_size, row.kernel) == (kind.format, *expected)


def test_blocks_of_the_flattened_weight() -> None:
    """(K, block size) -> group size."""
    sizes = {(64, 64): 64, (64, 128): 64, (4096, 64): 64, (4096, 4096): 4096, (512, 256): 128}
    sizes |= {(96, 64): 32, (2880, 64): 64, (96, 192): 96, (91, 64): None, (80, 64): None}
    assert {size: kernel_group_size(*size) for size in sizes} == sizes


def test_exponents() -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    expected = 2.0 ** (stored.double() - 127)
    assert torch.equal(scaled.exponents(stored)[:255].double(), expected[:255])
    assert torch.isnan(scaled.exponents(stored)[255])
    theirs = stored.view(torch.float8_e8m0fnu).float()
    assert torch.equal(scaled.exponents(stored)[:255], theirs[:255])


# -- other software --------------------------------------------------------------------------------


def test_transformers_reads_the_same_fp8(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    kind = Bytes("fp8", strategy="block", block=(32, 32), dtype=torch.float32)
    write_checkpoint(tmp_path, kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    assert torch.equal(logits(theirs), logits(effllm.load(tmp_path, progress=False)))


@pytest.mark.parametrize(
    ("block", "scale_fmt"),
    [((32, 32), "float"), ((16, 32), "ue8m0"), ((32, 64), "float"), (None, "float")],
)
def test_we_read_what_the_fp8_quantiser_of_transformers_writes(
    block: tuple[int, int] | None,
    scale_fmt: str,
    llama: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It asks for a GPU that the multiplication needs; quantising is plain PyTorch."""
    transformers = pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    from transformers.quantizers import quantizer_finegrained_fp8 as theirs

    model = theirs.FineGrainedFP8HfQuantizer
    monkeypatch.setattr(model, "validate_environment", lambda self, **options: None)
    llama.save_pretrained(tmp_path / "a")
    config = transformers.FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    auto = transformers.AutoModelForCausalLM
    quantised = auto.from_pretrained(tmp_path / "a", quantization_config=config)
    quantised.save_pretrained(tmp_path / "b")
    ours = effllm.load(tmp_path / "b", progress=False)
    formats = {row.name: row.format for row in ours.effllm_report.layers}
    assert formats["model.layers.2.mlp.up_proj"] == "fp8"
    down = "model.layers.2.mlp.down_proj"
    if block == (32, 64):  # does not fit: transformers multiplies by what it has never set
        assert formats[down] == "float32"
        assert torch.equal(ours.get_submodule(down).weight, llama.get_submodule(down).weight)
    else:
        assert formats[down] == "fp8"
        dequantize = transformers.FineGrainedFP8Config(dequantize=True)
        dense = auto.from_pretrained(tmp_path / "b", quantization_config=dequantize)
        assert torch.equal(logits(ours), logits(dense))
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=0.07, atol=0.01)


def test_weights_that_the_blocks_of_the_fp8_quantiser_do_not_fit(
    llama: Any, tmp_path: Path
) -> None:
    """It leaves them as they are, and saves a scale that it never set beside them."""
    kind = Bytes("fp8", strategy="block", dtype=torch.float32)
    written = write_checkpoint(tmp_path, kind)
    dense = written.dense.state_dict()[f"{Q}.weight"]
    unset = torch.full((2, 2), torch.nan)
    tensors = written.tensors | {f"{Q}.weight": dense, f"{Q}.weight_scale_inv": unset}
    write_tensors(tmp_path, tensors)
    model = effllm.load(tmp_path, progress=False)
    assert torch.equal(model.get_submodule(Q).weight, dense)
    rows = {row.name: row.kernel for row in inspect(tmp_path).layers}
    assert rows == {row.name: row.kernel for row in model.effllm_report.layers}
    assert rows[Q] == "dense"
    assert inspect(tmp_path).bytes == sum(tensor.nbytes for tensor in tensors.values())
    write_tensors(tmp_path, tensors | {"nowhere.weight_scale_inv": unset.clone()})
    with pytest.raises(CheckpointError, match=r"'nowhere\.weight_scale_inv' and 0 others belong"):
        effllm.load(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("format", "type_", "strategy", "symmetric"),
    [
        ("float-quantized", "float", "tensor", True),
        ("float-quantized", "float", "channel", True),
        ("float-quantized", "float", "block", True),
        ("int-quantized", "int", "channel", True),
        ("int-quantized", "int", "channel", False),
        ("naive-quantized", "int", "group", False),
    ],
)
def test_we_read_what_compressed_tensors_writes(
    format: str, type_: str, strategy: str, symmetric: bool, llama: Any, tmp_path: Path
) -> None:
    package = pytest.importorskip("compressed_tensors", reason="needs the extra effllm[formats]")
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    weights = QuantizationArgs(
        num_bits=8,
        type=type_,
        symmetric=symmetric,
        strategy=strategy,
        group_size=32 if strategy == "group" else None,
        block_structure=[16, 32] if strategy == "block" else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=format)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format=format,
        quantization_status=QuantizationStatus.FROZEN,
    )
    model = llama.to(torch.bfloat16)
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(torch.rand(module.weight_scale.shape) * 2e-3 + 2e-3)
            if not symmetric:
                zeros = torch.randint(-128, 128, module.weight_zero_point.shape)
                module.weight_zero_point.data.copy_(zeros)
    compressor = package.ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    ours = effllm.load(tmp_path, progress=False)
    compressor.decompress_model(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(ours.get_submodule(name).weight, module.weight), name


# -- files that do not fit -------------------------------------------------------------------------

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

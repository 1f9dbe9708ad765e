"""Formats with codes of a byte, and bitsandbytes: what is loaded, bit for bit, and what is not."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bytes_zoo import Blockwise, Bytes, Int8, Kind, Sparse
from compressed_tensors_package import load_what_it_writes
from formats_zoo import write_checkpoint, write_tensors
from tiny_models import logits
from torch import nn

import effllm
from effllm.formats import CheckpointError, inspect, scaled
from effllm.formats.bitsandbytes import kernel_group_size
from effllm.integrations import use_quantizer
from effllm.nn import Fp8Linear, Int8Linear, Lut4Linear

Q = "model.layers.1.self_attn.q_proj"
BF16 = torch.bfloat16

FORMATS: list[Kind] = [
    Bytes(strategy="tensor", static=True),
    Bytes(strategy="channel"),
    Bytes(strategy="block"),
    Bytes("int-quantized", floats=False),
    Bytes("int-quantized", floats=False, symmetric=False),
    Bytes("naive-quantized", floats=False, strategy="group", symmetric=False),
    Bytes("fp8", strategy="block"),
    Bytes("fp8", strategy="block", exponents=torch.float8_e8m0fnu),
    Sparse(),
    Sparse("sparse-bitmask"),
    Bytes(sparsity="sparse-24-bitmask"),
    Blockwise("nf4"),
    Blockwise("nf4", nested=True),
    Blockwise("fp4", blocksize=128),
    Int8(),
]
OTHERS: list[Kind] = [
    Bytes(strategy="block", dtype=BF16, head=True, tied=True, shards=2),
    Bytes("int-quantized", floats=False, strategy="tensor", symmetric=False, tied=True),
    Bytes("naive-quantized", floats=False, bits=4, strategy="block", symmetric=False),
    Bytes("naive-quantized", strategy="group"),
    Bytes("fp8", strategy="block", dtype=torch.float32, bias=True),
    Bytes("fp8", strategy="block", exponents=torch.uint8),
    Bytes("fp8", strategy="tensor", static=True),
    Bytes("fp8", strategy="tensor", name="weight_scale", tied=True),
    Bytes(strategy="block", sparsity="sparse-bitmask", intermediate=91, shards=2),
    Bytes("int-quantized", floats=False, sparsity="sparse-24-bitmask", tied=True, head=True),
    Blockwise("nf4", storage=BF16, head=True, tied=True, shards=2),
    Blockwise("fp4", blocksize=256, nested=True, bias=True),
    Blockwise("fp4", blocksize=4096, intermediate=128),
    Int8(tied=True, head=True),
]


def kinds() -> list[Kind]:
    """Formats x dtypes x bias x tied head x odd N and K, and the odd ones."""
    options = itertools.product(
        FORMATS, (torch.float16, BF16), (False, True), (False, True), (False, True)
    )
    return [
        *(
            replace(kind, dtype=dtype, bias=bias, tied=tied, intermediate=odd_size(kind, odd))
            for kind, dtype, bias, tied, odd in options
        ),
        *OTHERS,
    ]


def odd_size(kind: Kind, odd: bool) -> int:
    """Of the MLP, N of two layers and K of one. 2:4 is of four input channels each."""
    fours = "sparse-24-bitmask" in (kind.format, getattr(kind, "sparsity", None))
    return (92 if fours else 91) if odd else 96


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.id)
def test_loads_what_was_stored(kind: Any, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, kind)
    model = effllm.load(tmp_path, dtype=torch.float32, progress=False)
    report = {row.name: row for row in model.effllm_report.layers}
    for name, weight in written.weights.items():
        module = model.get_submodule(name)
        assert torch.equal(module.weight, weight.dense), name
        kernels = {
            Lut4Linear: {"lut4_gemm"},
            Fp8Linear: {"fp8_gemm", "fp8_weight_gemm"},
            Int8Linear: {"int8_weight_gemm"},
        }
        for layer, names in kernels.items():
            assert isinstance(module, layer) == (report[name].kernel in names), name
        assert type(module) in (*kernels, nn.Linear), name
        if isinstance(module, Fp8Linear):
            assert (module.inputs_per is None) == (report[name].kernel == "fp8_weight_gemm"), name
            module.inputs_per = None  # as in the dense model
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
        Bytes(strategy="channel", bias=True),
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
        (Bytes("int-quantized", floats=False), (8, 64, "int8_weight_gemm")),
        (Bytes("int-quantized", floats=False, symmetric=False), (8, 64, "dense (8-bit codes)")),
        (Bytes("fp8", strategy="block"), (8, 48, "dense (e4m3 codes)")),
        (Blockwise("nf4"), (4, 64, "lut4_gemm")),
        (Int8(), (8, 64, "dense (8-bit codes)")),
        (Sparse(), (16, 64, "dense (sparse-24-bitmask)")),
        (Bytes(sparsity="sparse-24-bitmask"), (8, 64, "fp8_weight_gemm")),
        (Bytes(strategy="tensor"), (8, 64, "fp8_weight_gemm")),
        (Bytes(strategy="channel"), (8, 64, "fp8_weight_gemm")),
        (Bytes(strategy="block", block=(128, 128)), (8, 128, "fp8_weight_gemm")),
        (Bytes("fp8", strategy="block", block=(128, 128)), (8, 128, "fp8_gemm")),
        (Bytes("fp8", strategy="tensor", static=True), (8, 64, "fp8_gemm")),
        (Bytes("fp8", strategy="tensor"), (8, 64, "fp8_weight_gemm")),
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
    down = "model.layers.2.mlp.down_proj"
    fits = block != (32, 64)
    if not fits and quantised.get_submodule(down).weight.dtype == torch.float8_e4m3fn:
        pytest.skip("this transformers casts what the blocks do not fit, without a scale")
    quantised.save_pretrained(tmp_path / "b")
    ours = effllm.load(tmp_path / "b", progress=False)
    formats = {row.name: row.format for row in ours.effllm_report.layers}
    assert formats["model.layers.2.mlp.up_proj"] == "fp8"
    if not fits:  # transformers multiplies by what it has never set
        assert formats[down] == "float32"
        assert torch.equal(ours.get_submodule(down).weight, llama.get_submodule(down).weight)
    else:
        assert formats[down] == "fp8"
        dequantize = transformers.FineGrainedFP8Config(dequantize=True)
        dense = auto.from_pretrained(tmp_path / "b", quantization_config=dequantize)
        torch.testing.assert_close(logits(ours), logits(dense), rtol=1e-4, atol=1e-4)
    for name, parameter in llama.named_parameters():
        owner, _, attribute = name.rpartition(".")
        found = getattr(ours.get_submodule(owner), attribute)
        # Half a step of e4m3 is 1/16; transformers 5.17 is off by up to a whole one.
        torch.testing.assert_close(found, parameter, rtol=0.13, atol=0.01)


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
    load_what_it_writes(
        llama,
        tmp_path,
        format,
        (2e-3, 4e-3),
        num_bits=8,
        type=type_,
        symmetric=symmetric,
        strategy=strategy,
        group_size=32 if strategy == "group" else None,
        block_structure=[16, 32] if strategy == "block" else None,
    )

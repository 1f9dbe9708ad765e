"""Blocks: decoded against a scalar reference and the gguf package, encoded, and as int4 codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf_bytes import BLOCKS, decode, random_blocks

from effllm import ops
from effllm.formats.gguf import GgufError, TensorType, dequantize, quantize
from effllm.formats.gguf import blocks as blocks_module
from effllm.formats.gguf.blocks import DECODED, ENCODED, from_blocks, from_int4, to_blocks, to_int4
from effllm.formats.gguf.layout import BLOCK_TYPES
from effllm.nn import GgufLinear

NEEDS_GGUF = "needs the extra effllm[formats] (gguf)"


def spread_weights(rows: int, k: int) -> torch.Tensor:
    """Normal values of many magnitudes, with blocks of zeros, ties of largest values, and values
    too small for an fp16 scale."""
    weight = torch.randn(rows, k) * 10 ** torch.randn(rows, 1)
    weight[0] = 0
    weight[1, :32] = torch.tensor([1.5, -1.5]).repeat(16)
    weight[2] = 1e-42 * torch.randn(k)
    weight[3] = 3e-8 * torch.randn(k)
    weight[4, :64] = torch.arange(64) - 31.5  # halves
    return weight


@pytest.mark.parametrize("kind", BLOCKS)
def test_decoders_agree_with_the_scalar_reference(kind: str, device: str) -> None:
    code, values, size, _ = BLOCKS[kind]
    assert TensorType[kind] == code
    assert (TensorType[kind].block_values, TensorType[kind].block_bytes) == (values, size)
    blocks = random_blocks(kind, 24)
    expected = np.array([decode(kind, block.tobytes()) for block in blocks], np.float32)
    shape = (6, 4 * values)
    raw = torch.from_numpy(blocks).to(device)
    found = dequantize(raw, TensorType[kind], shape)
    assert (found.dtype, found.device.type) == (torch.float32, device)
    assert torch.equal(found.cpu(), torch.from_numpy(expected).view(shape))
    half = dequantize(raw, TensorType[kind], shape, torch.bfloat16)
    assert torch.equal(half, found.bfloat16())


@pytest.mark.parametrize("kind", [kind.name for kind in DECODED])
def test_decoders_agree_with_the_gguf_package(kind: str) -> None:
    pytest.importorskip("gguf.quants", reason=NEEDS_GGUF)
    from gguf import GGMLQuantizationType, quants

    if kind in BLOCKS:
        raw = random_blocks(kind, 300, seed=1).reshape(10, -1)
    else:
        raw = quantize(torch.randn(10, 64), TensorType[kind]).view(10, -1).numpy()
    expected = quants.dequantize(raw, GGMLQuantizationType[kind])
    found = dequantize(torch.from_numpy(raw.copy()), TensorType[kind], expected.shape)
    assert torch.equal(found, torch.from_numpy(expected.astype(np.float32)))


def test_block_sizes_agree_with_the_gguf_package() -> None:
    constants = pytest.importorskip("gguf.constants", reason=NEEDS_GGUF)
    sizes = constants.GGML_QUANT_SIZES
    for kind in TensorType:
        theirs = sizes[constants.GGMLQuantizationType[kind.name]]
        assert (kind.block_values, kind.block_bytes) == theirs, kind.name
        assert kind == constants.GGMLQuantizationType[kind.name]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_encoders_agree_with_the_gguf_package(kind: str) -> None:
    pytest.importorskip("gguf.quants", reason=NEEDS_GGUF)
    from gguf import GGMLQuantizationType, quants

    weight = spread_weights(64, 256)
    weight[2] = 0  # the package divides 0 by 0 for the reciprocal of so small a scale
    expected = quants.quantize(weight.numpy(), GGMLQuantizationType[kind])
    found = quantize(weight, TensorType[kind])
    assert torch.equal(found, torch.from_numpy(expected.copy()).view(torch.uint8).flatten())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_large_tensors_are_converted_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.from_numpy(random_blocks(kind, 100)).flatten()
    size = 100 * TensorType[kind].block_values
    whole = dequantize(raw, TensorType[kind], (size,))
    monkeypatch.setattr(blocks_module, "_PIECE", 7)
    assert torch.equal(dequantize(raw, TensorType[kind], (size,)), whole)
    if TensorType[kind] in ENCODED:
        in_pieces = quantize(whole, TensorType[kind])
        monkeypatch.undo()
        assert torch.equal(in_pieces, quantize(whole, TensorType[kind]))


@pytest.mark.parametrize(("kind", "steps"), [("Q4_0", 1.0), ("Q8_0", 0.5)])
def test_encoding_is_off_by_a_step_at_most(kind: str, steps: float) -> None:
    weight = spread_weights(40, 256)
    back = dequantize(quantize(weight, TensorType[kind]), TensorType[kind], (40, 256))
    # Q4_0 has the codes -8..7: the largest value opposite in sign to d is cut to 7 steps.
    largest = weight.view(40, 8, 32).abs().amax(-1, keepdim=True)
    step = largest / (8 if kind == "Q4_0" else 127)
    # The scale is off by its rounding to fp16, which is coarse when it is subnormal.
    slack = largest * 2.0**-11 + 127 * 2.0**-25
    assert ((weight - back).view(40, 8, 32).abs() <= steps * step + slack).all()
    assert (back[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_are_exact_where_the_type_holds_them(kind: str, dtype: torch.dtype) -> None:
    weight = (torch.randint(-128, 128, (3, 5)) / 64).to(dtype)
    back = dequantize(quantize(weight, TensorType[kind]), TensorType[kind], (3, 5))
    assert torch.equal(back, weight.float())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 32), (2, 3, 4, 32)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    assert torch.equal(dequantize(quantize(weight, TensorType.F32), TensorType.F32, shape), weight)
    if shape:
        raw = quantize(weight, TensorType.Q8_0)
        assert dequantize(raw, TensorType.Q8_0, shape).shape == shape
    if not weight.numel():
        nothing = torch.empty(0, dtype=torch.uint8)
        assert all(dequantize(nothing, kind, shape).shape == shape for kind in DECODED)


def test_strided_weights_are_encoded_in_order() -> None:
    weight = torch.randn(64, 32)
    assert torch.equal(
        quantize(weight.t(), TensorType.Q8_0), quantize(weight.t().contiguous(), TensorType.Q8_0)
    )


@pytest.mark.parametrize("seed", range(3))
def test_q4_0_becomes_int4_and_back_without_loss(seed: int) -> None:
    raw = torch.from_numpy(random_blocks("Q4_0", 70 * 4, seed))
    converted = to_int4(raw, TensorType.Q4_0, (70, 128))
    assert converted is not None
    codes, scales, zeros = converted
    assert zeros is None
    assert (scales.dtype, scales.shape) == (torch.float16, (70, 4))
    weight = (codes.float() - 8) * scales.float().repeat_interleave(32, 1)
    assert torch.equal(weight, dequantize(raw, TensorType.Q4_0, (70, 128)))
    assert torch.equal(from_int4(codes, scales), raw.flatten())
    unpacked = ops.int4_unpack(ops.int4_pack(codes), 70, 128)
    assert torch.equal(from_int4(unpacked, scales), raw.flatten())


def q4_1(d: list[float], m: list[float]) -> torch.Tensor:
    """Blocks with these d and m, and random codes."""
    blocks = random_blocks("Q4_1", len(d))
    blocks[:, :4] = np.array([d, m], np.float16).T.copy().view(np.uint8)
    return torch.from_numpy(blocks)


def test_q4_1_becomes_int4_where_its_minimum_is_whole_steps() -> None:
    d = [0.25, -0.5, 0.1, 0.0, 0.0, 0.125, 2.0**-24, 0.5]
    steps = [8, 3, 0, 0, 0, 255, 15, 16]
    m = [-float(np.float16(a)) * z for a, z in zip(d, steps, strict=True)]
    m[3] = 0.75  # a block of 32 equal values
    raw = q4_1(d, m)
    converted = to_int4(raw, TensorType.Q4_1, (2, 128))
    assert converted is not None
    codes, scales, zeros = converted
    assert zeros is not None
    assert int(codes.max()) <= 15
    assert zeros.dtype == torch.uint8
    assert [zeros.flatten().tolist()[i] for i in (0, 1, 2, 5, 6, 7)] == [8, 3, 0, 255, 15, 16]
    offset = codes.float() - zeros.float().repeat_interleave(32, 1)
    weight = offset * scales.float().repeat_interleave(32, 1)
    assert torch.equal(weight, dequantize(raw, TensorType.Q4_1, (2, 128)))


@pytest.mark.parametrize(
    ("d", "m"),
    [
        (0.25, -0.3),  # between two steps
        (0.1, -0.7),  # a whole number only before fp16 rounded both
        (0.25, 0.25),  # the zero point would be -1
        (0.25, -64.0),  # and here 256
        (float("inf"), 0.0),
        (float("nan"), 1.0),
        (1.0, float("nan")),
        (0.0, float("inf")),
    ],
)
def test_q4_1_without_an_exact_form_is_left_alone(d: float, m: float) -> None:
    raw = q4_1([0.25, d], [-2.0, m])
    assert to_int4(raw, TensorType.Q4_1, (2, 32)) is None


def test_int4_becomes_q4_1_where_the_minimum_is_an_fp16_number() -> None:
    scales = torch.tensor([[0.25, 0.1, -0.5], [0.1, 0.1, 2.0**-24]]).half()
    zeros = torch.tensor([[3, 8, 255], [0, 1, 15]], dtype=torch.uint8)
    codes = torch.randint(0, 16, (2, 96), dtype=torch.uint8)
    weight = (codes.float() - zeros.repeat_interleave(32, 1)) * scales.float().repeat_interleave(
        32, 1
    )
    raw = from_int4(codes, scales, zeros)
    assert torch.equal(dequantize(raw, TensorType.Q4_1, (2, 96)), weight)
    again = to_int4(raw, TensorType.Q4_1, (2, 96))
    assert again is not None
    for found, expected in zip(again, (codes, scales, zeros), strict=True):
        assert torch.equal(found, expected)


def test_int4_becomes_q4_1_where_a_block_is_one_value() -> None:
    """As ``to_int4`` makes them of blocks without steps."""
    scales, zeros = torch.tensor([[0.1]]).half(), torch.tensor([[7]], dtype=torch.uint8)
    codes = torch.full((1, 32), 8, dtype=torch.uint8)
    raw = from_int4(codes, scales, zeros)
    assert raw.view(torch.float16)[:2].tolist() == [0, scales.item()]
    assert (dequantize(raw, TensorType.Q4_1, (1, 32)) == scales.item()).all()
    codes[0, 5] = 9
    with pytest.raises(GgufError, match="products with the scales are fp16 numbers"):
        from_int4(codes, scales, zeros)
    with pytest.raises(GgufError, match="products with the scales are fp16 numbers"):
        from_int4(codes, torch.full((1, 1), 60000.0).half(), zeros + 1)  # beyond fp16


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_blocks_become_layers_and_back_without_loss(kind: str, seed: int) -> None:
    """Of any bytes, codes that no quantiser makes among them."""
    n, k = 70, 512
    raw = torch.from_numpy(random_blocks(kind, n * k // BLOCKS[kind][1], seed)).flatten()
    codes, headers = to_blocks(raw, TensorType[kind], (n, k))
    assert torch.equal(from_blocks(codes, headers, TensorType[kind]), raw)
    linear = torch.nn.Linear(k, n, bias=False)
    layer = GgufLinear.from_codes(linear, codes, headers, BLOCK_TYPES[TensorType[kind]])
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer.weight, dequantize(raw, TensorType[kind], (n, k)))
    assert torch.equal(from_blocks(layer.codes, layer.headers, TensorType[kind]), raw)


def test_other_types_have_no_int4_form() -> None:
    raw = torch.from_numpy(random_blocks("Q5_0", 1))
    assert to_int4(raw, TensorType.Q5_0, (1, 32)) is None


def test_results_share_no_memory_with_the_file() -> None:
    raw = torch.ones(18, dtype=torch.uint8)
    converted = to_int4(raw, TensorType.Q4_0, (1, 32))
    floats = dequantize(raw[:16], TensorType.F32, (4,))
    assert converted is not None
    before = (converted[0].clone(), converted[1].clone(), floats.clone())
    raw.zero_()
    assert all(torch.equal(a, b) for a, b in zip((*converted[:2], floats), before, strict=True))


NAN, INFINITE = torch.full((256,), float("nan")), torch.full((256,), float("-inf"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("weight", [NAN, INFINITE, torch.full((256,), 1e9)])
def test_weights_without_a_scale_are_refused(kind: str, weight: torch.Tensor) -> None:
    with pytest.raises(GgufError, match=f"not finite, or too large for a scale of {kind}"):
        quantize(weight, TensorType[kind])


def test_errors_name_found_and_needed() -> None:
    with pytest.raises(GgufError, match="type IQ4_NL has no decoder, only F32, F16, BF16, Q4_0"):
        dequantize(torch.zeros(18, dtype=torch.uint8), TensorType.IQ4_NL, (32,))
    with pytest.raises(GgufError, match=r"Q4_0 \[2, 32\] needs 36 bytes .* got 35"):
        dequantize(torch.zeros(35, dtype=torch.uint8), TensorType.Q4_0, (2, 32))
    with pytest.raises(GgufError, match=r"got 9 of torch.float32"):
        dequantize(torch.zeros(9), TensorType.F32, (9,))
    with pytest.raises(
        GgufError, match="type Q5_K has no encoder, only F32, F16, BF16, Q4_0, Q4_1, Q8"
    ):
        quantize(torch.zeros(256), TensorType.Q5_K)
    with pytest.raises(GgufError, match=r"rows of 48 values .* Q8_0, which needs a multiple of 32"):
        quantize(torch.zeros(2, 48), TensorType.Q8_0)
    with pytest.raises(GgufError, match="only float tensors"):
        quantize(torch.zeros(32, dtype=torch.int8), TensorType.Q8_0)
    with pytest.raises(GgufError, match="too large for F16"):
        quantize(torch.tensor([1e5]), TensorType.F16)
    with pytest.raises(GgufError, match=r"float16 scales \[2, 1\], got torch.float32 \[2, 1\]"):
        from_int4(torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1))
    scales, signed = torch.ones(2, 1).half(), torch.ones(2, 1, dtype=torch.int8)
    with pytest.raises(
        GgufError, match=r"Q4_1 needs uint8 zeros \[2, 1\], got torch.int8 \[2, 1\]"
    ):
        from_int4(torch.zeros(2, 32, dtype=torch.uint8), scales, signed)
    with pytest.raises(GgufError, match=r"uint8 codes .* \[2, 33\]"):
        from_int4(torch.zeros(2, 33, dtype=torch.uint8), torch.ones(2, 1))
    assert set(ENCODED) <= set(DECODED)

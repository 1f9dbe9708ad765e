"""Every format's functions, bit for bit against the numpy reference."""

from __future__ import annotations

import formats_reference as reference
import numpy as np
import pytest
import torch
from formats_reference import Weight, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.formats import GroupedWeight, awq, bitstream, compressed_tensors, gptq
from effllm.formats.grouped import int4_tensors, kernel_groups
from effllm.ops.int4_gemm import dequantize_codes

DTYPES = [torch.float16, torch.bfloat16]


def assert_same_weight(found: GroupedWeight, expected: Weight) -> None:
    assert found.codes.numpy().tolist() == expected.q.tolist()
    zeros = torch.full_like(found.scales, 1 << (expected.bits - 1))
    zeros = zeros if found.zeros is None else found.zeros
    assert zeros.long().numpy().tolist() == expected.z.tolist()
    assert torch.equal(found.scales, expected.s)
    assert found.groups.numpy().tolist() == expected.g_idx.tolist()
    # The product of two numbers of 11 bits or fewer is exact in fp32.
    assert torch.equal(found.dequantize().double(), expected.dense)


def kernel_weight(weight: GroupedWeight) -> Tensor:
    """What the int4 kernels compute with, columns in the order of the input channels."""
    groups = kernel_groups(weight.groups)
    assert groups is not None
    codes, scales, zeros = int4_tensors(weight, groups)
    assert int(codes.max()) <= 15
    dense = dequantize_codes(codes, scales, zeros, group_size=groups.group_size)
    if groups.perm is None:
        return dense
    out = torch.empty_like(dense)
    out[:, groups.perm.long()] = dense
    return out


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(0, 3), count=st.integers(0, 100), bits=st.integers(1, 8), data=st.data())
def test_bit_stream(rows: int, count: int, bits: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    values = rng.integers(0, 1 << bits, (rows, count))
    words = bitstream.pack(torch.from_numpy(values.astype(np.uint8)), bits)
    assert torch.equal(words, reference.stream(values, bits))
    assert bitstream.unpack(words, bits, count).numpy().tolist() == values.tolist()
    # Strided words, as the transposed reads of GPTQ bring.
    assert torch.equal(
        bitstream.unpack(words.T.contiguous().T, bits, count), bitstream.unpack(words, bits, count)
    )


def test_bit_stream_errors() -> None:
    with pytest.raises(ValueError, match=r"9 codes of 4 bits must be int32 \[\.\.\., 2\], got"):
        bitstream.unpack(torch.zeros(3, 1, dtype=torch.int32), 4, 9)
    with pytest.raises(ValueError, match="got torch\\.int64"):
        bitstream.unpack(torch.zeros(3, 1, dtype=torch.int64), 4, 8)
    with pytest.raises(ValueError, match="codes must fit in 3 bits, got 8"):
        bitstream.pack(torch.tensor([8], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="codes must be uint8"):
        bitstream.pack(torch.tensor([8]), 4)


def test_awq_golden_word() -> None:
    assert reference.awq_words(np.arange(8)[None]).tolist() == [[0x75316420]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 128, 64), (24, 96, 32), (8, 72, -1)])
def test_awq(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    expected = random_weight(n, k, 4, k if group_size == -1 else group_size, dtype=dtype)
    tensors = reference.awq_tensors(expected)
    weight = awq.decode(tensors["qweight"], tensors["qzeros"], tensors["scales"], group_size)
    assert_same_weight(weight, expected)
    assert torch.equal(kernel_weight(weight).double(), expected.dense)
    written = awq.encode(weight)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_awq_without_zero_points() -> None:
    expected = random_weight(16, 64, 4, 32, symmetric=True)
    tensors = reference.awq_tensors(expected)
    weight = awq.decode(tensors["qweight"], None, tensors["scales"], 32)
    assert_same_weight(weight, expected)
    assert torch.equal(awq.encode(weight)["qzeros"], tensors["qzeros"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(
    bits: int, version: gptq.Version, symmetric: bool, shuffled: bool, dtype: torch.dtype
) -> None:
    # N odd: the last word of the zero points is in part empty.
    expected = random_weight(
        35, 96, bits, 32, symmetric=symmetric, shuffled=shuffled, dtype=dtype, seed=bits
    )
    tensors = reference.gptq_tensors(expected, version)
    weight = gptq.decode(**tensors, bits=bits, group_size=32, in_features=96, version=version)
    assert_same_weight(weight, expected)
    assert (weight.g_idx is not None) == shuffled
    if bits <= 4:
        assert torch.equal(kernel_weight(weight).double(), expected.dense)
    written = gptq.encode(weight)
    assert all(
        torch.equal(written[name], tensor)
        for name, tensor in reference.gptq_tensors(expected, 2).items()
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_zero_points_of_a_symmetric_file_tell_its_version(bits: int) -> None:
    expected = random_weight(20, 64, bits, 32, symmetric=True)
    for version in (1, 2):
        stored = gptq.stored_zeros(reference.gptq_tensors(expected, version)["qzeros"], bits, 20)
        for declared in (1, 2):
            assert gptq.stored_version(stored, bits, True, declared) == version
            assert gptq.stored_version(stored, bits, False, declared) == declared
    mixed = torch.tensor([[0, 1]], dtype=torch.uint8)
    assert gptq.stored_version(mixed, bits, True, 1) == 1
    assert gptq.stored_version(mixed, bits, True, 2) == 2


def test_version_1_zero_points_that_borrowed() -> None:
    """z = 0 was stored as -1 and took from its neighbour: one word, -0x11111111."""
    expected = random_weight(16, 32, 4, 32)
    expected.z[3, 0] = 0
    tensors = reference.gptq_tensors(expected, 1)
    value_by_value = (reference.read_stream(tensors["qzeros"], 4, 16) + 1) % 16
    assert value_by_value.T.tolist() != expected.z.tolist()
    assert_same_weight(
        gptq.decode(**tensors, bits=4, group_size=32, in_features=32, version=1), expected
    )
    stored = gptq.stored_zeros(tensors["qzeros"], 4, 16)
    assert gptq.is_ambiguous(stored, 4, 1)
    assert not gptq.is_ambiguous(stored, 4, 2)


def test_gptq_group_indices() -> None:
    expected = random_weight(8, 64, 4, 32, shuffled=True)
    tensors = reference.gptq_tensors(expected)
    options = {"bits": 4, "group_size": 32, "in_features": 64, "version": 2}
    negative = tensors | {"g_idx": torch.where(tensors["g_idx"] == 1, -1, tensors["g_idx"])}
    assert_same_weight(gptq.decode(**negative, **options), expected)
    for bad in (2, -3):
        wrong = tensors | {"g_idx": torch.full((64,), bad, dtype=torch.int32)}
        with pytest.raises(ValueError, match=rf"g_idx must be in -2\.\.1, got {bad}"):
            gptq.decode(**wrong, **options)
    with pytest.raises(ValueError, match=r"g_idx must be int \[64\], got torch.int32 \[63\]"):
        gptq.decode(**(tensors | {"g_idx": tensors["g_idx"][1:]}), **options)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_pack_quantized(group_size: int, bits: int, symmetric: bool, shuffled: bool) -> None:
    expected = random_weight(
        35, 64, bits, group_size, symmetric=symmetric, shuffled=shuffled, dtype=torch.bfloat16
    )
    tensors = reference.packed_tensors(expected, symmetric)
    zero_point = tensors.get("weight_zero_point")
    options = {"bits": bits, "group_size": group_size, "in_features": 64}
    weight = compressed_tensors.decode(
        tensors["weight_packed"],
        tensors["weight_scale"],
        zero_point,
        tensors.get("weight_g_idx"),
        **options,
    )
    assert_same_weight(weight, expected)
    if bits <= 4:
        assert torch.equal(kernel_weight(weight).double(), expected.dense)
    if weight.g_idx is not None:
        with pytest.raises(ValueError, match="reordered"):
            compressed_tensors.encode(weight)
        return
    written = compressed_tensors.encode(weight)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    unused = torch.full((64,), -1, dtype=torch.int32)
    again = compressed_tensors.decode(
        tensors["weight_packed"], tensors["weight_scale"], zero_point, unused, **options
    )
    assert again.g_idx is None


def test_unpacked_zero_points_of_compressed_tensors() -> None:
    expected = random_weight(12, 64, 4, 32)
    tensors = reference.packed_tensors(expected)
    signed = torch.from_numpy(expected.z - 8).to(torch.int8)
    weight = compressed_tensors.decode(
        tensors["weight_packed"],
        tensors["weight_scale"],
        signed,
        None,
        bits=4,
        group_size=32,
        in_features=64,
    )
    assert_same_weight(weight, expected)


# -- groups of the kernels ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "group_size"),
    [
        ([64, 64], 64),
        ([128, 128, 128], 128),
        ([256, 256], 128),  # split: two kernel groups share a scale
        ([96, 96], 32),
        ([32, 32], 32),
        ([100], 100),
        ([128, 40], 128),  # the last group may be short
        ([64, 32, 128], 32),  # uneven, as a sorted g_idx may be
        ([16, 16], None),
        ([40, 40], None),
        ([31, 33], None),
    ],
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_kernel_groups(sizes: list[int], group_size: int | None, shuffled: bool) -> None:
    g_idx = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    if shuffled:
        g_idx = g_idx[torch.randperm(g_idx.numel())]
    groups = kernel_groups(g_idx)
    if group_size is None:
        assert groups is None
        return
    assert groups is not None
    assert groups.group_size == group_size
    columns = torch.arange(g_idx.numel())
    perm = columns if groups.perm is None else groups.perm.long()
    assert torch.equal(perm.sort().values, columns)
    assert torch.equal(groups.take[columns // group_size], g_idx[perm])
    if not shuffled or len(sizes) == 1:
        assert groups.perm is None


def test_writers_refuse_what_their_format_cannot_hold() -> None:
    weight = GroupedWeight(torch.zeros(12, 40, dtype=torch.uint8), torch.ones(12, 2), None, 4, 32)
    with pytest.raises(ValueError, match="AWQ needs N % 8 == 0 and K % group_size == 0, got N = 1"):
        awq.encode(weight)
    with pytest.raises(ValueError, match="compressed-tensors needs K % group_size == 0, got K = 4"):
        compressed_tensors.encode(weight)
    assert gptq.encode(weight)["scales"].shape == (2, 12)
    with pytest.raises(ValueError, match="AWQ holds 4-bit codes"):
        awq.encode(GroupedWeight(weight.codes, weight.scales, None, 3, 32))
    wide = torch.full((12, 2), 16, dtype=torch.uint8)
    for encode in (gptq.encode, awq.encode):
        with pytest.raises(ValueError, match="codes must fit in 4 bits, got 16"):
            encode(GroupedWeight(weight.codes[:8, :32], weight.scales[:8, :1], wide[:8, :1], 4, 32))

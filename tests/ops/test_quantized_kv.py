"""Caches in e4m3, int8 and int4: what kv_append stores and what paged_attention makes of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.ops import kv_append, paged_attention
from effllm.ops._kv_codes import (
    QUANTIZED_KV,
    as_bits,
    codes_per_row,
    dequantize_kv,
    empty_kv_scale,
    quantize_kv,
)
from effllm.ops.paged_attention import paged_attention_ref
from effllm.testing import hostile
from effllm.testing.cases.kv_append import KvAppendCase
from effllm.testing.cases.paged_attention import MIXED, PagedAttentionCase
from effllm.testing.compare import assert_close_to_reference, assert_equal
from effllm.testing.run import bind, check_values, schema_of

INF, NAN = math.inf, math.nan
every_dtype = pytest.mark.parametrize("kv_dtype", QUANTIZED_KV)


def append(rows: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows [T, D], through kv_append into pages of four."""
    dtype = QUANTIZED_KV[kv_dtype]
    count, dim = rows.shape
    num_pages = -(-count // 4)
    shape = (num_pages, 4, 1, codes_per_row(dim, dtype))
    caches = [torch.empty(shape, dtype=dtype, device=rows.device) for _ in range(2)]
    scales = [empty_kv_scale(num_pages, 1, 4, dtype, rows.device) for _ in range(2)]
    slots = torch.arange(count, device=rows.device)
    kv_append(rows[:, None], rows.flip(0)[:, None], *caches, slots, *scales)
    flipped = [scale[slots // 4, slots % 4, 0].flip(0) for scale in scales[1:]]
    assert_equal(scales[0][slots // 4, slots % 4, 0], flipped[0], name="v_scale")
    return as_bits(caches[0])[slots // 4, slots % 4, 0].view(dtype), scales[0][
        slots // 4, slots % 4, 0
    ]


def one_key(codes: Tensor, scales: Tensor, dtype: torch.dtype, **options: Any) -> Any:
    """Rows [N, row] of codes as the only key and value of N sequences with one query each."""
    count, row = codes.shape
    device = codes.device
    dim = row * 2 if codes.dtype == torch.uint8 else row
    cache, scales = codes[:, None, None], scales[:, None, None]
    q = options.pop("q", torch.ones(count, 1, dim, dtype=dtype, device=device))
    per_sequence = len(q) // count
    return paged_attention(
        q,
        cache,
        cache,
        torch.arange(count, dtype=torch.int32, device=device)[:, None],
        torch.ones(count, dtype=torch.int32, device=device),
        torch.arange(count + 1, dtype=torch.int32, device=device) * per_sequence,
        scales,
        scales,
        max_seqlen_q=per_sequence,
        causal=False,
        **options,
    )


def all_codes(kv_dtype: str, device: str) -> Tensor:
    """Every code but the NaNs of e4m3, in rows of 64 codes."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    if kv_dtype == "e4m3":
        codes[[0x7F, 0xFF]] = 0
    return codes.view(4, 64).view(QUANTIZED_KV[kv_dtype]).to(device)


def scales_for(kv_dtype: str, count: int, device: str) -> Tensor:
    pair = torch.tensor([0.5, -3.0], dtype=torch.float16, device=device).expand(count, 2)
    return pair if kv_dtype == "int4" else pair[:, 0].float()


@pytest.mark.sanitizer
@every_dtype
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_code_of_a_value(
    kv_dtype: str, queries: int, dtype: torch.dtype, device: str
) -> None:
    """One key: out is its value, which all three formats hold exactly in fp16 and bf16."""
    codes = all_codes(kv_dtype, device)
    scale = scales_for(kv_dtype, len(codes), device)
    exact = dequantize_kv(codes, scale, torch.float64)
    q = torch.zeros(len(codes) * queries, 1, exact.shape[1], dtype=dtype, device=device)
    out, _ = one_key(codes, scale, dtype, q=q)
    assert_equal(
        out.view(len(codes), queries, -1), exact[:, None].expand(-1, queries, -1).to(dtype)
    )


@every_dtype
@pytest.mark.parametrize("queries", [1, 40])
def test_every_code_of_a_key(kv_dtype: str, queries: int, device: str) -> None:
    """One key, and queries that pick one of its elements each: lse is that element."""
    codes = all_codes(kv_dtype, device)
    scale = scales_for(kv_dtype, len(codes), device)
    exact = dequantize_kv(codes, scale, torch.float64)
    dim = exact.shape[1]
    for first in range(0, dim, queries):
        picks = torch.arange(first, first + queries, device=device) % dim
        q = torch.nn.functional.one_hot(picks, dim).to(torch.bfloat16)
        q = q.repeat(len(codes), 1)[:, None]
        _, lse = one_key(codes, scale, torch.bfloat16, q=q, scale=1.0)
        torch.testing.assert_close(
            lse.view(len(codes), queries).double(), exact[:, picks], rtol=1e-6, atol=1e-6
        )


@every_dtype
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_are_the_nearest(kv_dtype: str, dtype: torch.dtype, device: str) -> None:
    rows = hostile.normal(33, 96, dtype=dtype, device=device)
    codes, scale = append(rows, kv_dtype)
    expected = quantize_kv(rows, QUANTIZED_KV[kv_dtype])
    assert_equal(as_bits(codes), as_bits(expected[0]))
    assert_equal(scale, expected[1])
    error = (dequantize_kv(codes, scale, torch.float64) - rows.double()).abs()
    if kv_dtype == "e4m3":  # half a unit of four bits, or of the smallest number
        step = torch.maximum(rows.double().abs() * 2**-4, 2**-10 * scale[:, None].double())
        assert (error <= step * (1 + 1e-6)).all()
    else:  # a step; fp16 rounds the scale and zero of int4
        step = scale.double() if kv_dtype == "int8" else scale[:, 0].double()
        assert (error <= 0.52 * step[:, None]).all()


@every_dtype
def test_rows_of_zeros_and_constants(kv_dtype: str, device: str) -> None:
    rows = torch.tensor([0.0, -0.0, 3.0, -3.0, 1e-30, -(2.0**-24)], device=device)
    codes, scale = append(rows[:, None].repeat(1, 64), kv_dtype)
    assert scale.isfinite().all()
    if kv_dtype != "int4":
        assert scale[:2].tolist() == [1.0, 1.0]
    found = dequantize_kv(codes, scale, torch.float64)
    assert (found[:2] == 0).all()
    atol = 2.0**-14 if kv_dtype == "int4" else 0.0
    torch.testing.assert_close(found, rows.double()[:, None].expand(-1, 64), rtol=1e-3, atol=atol)


@every_dtype
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_without_an_answer_is_nan(kv_dtype: str, value: float, device: str) -> None:
    rows = hostile.normal(6, 64, dtype=torch.bfloat16, device=device)
    clean = append(rows, kv_dtype)
    rows[2, 5] = value
    codes, scale = append(rows, kv_dtype)
    assert (as_bits(codes[2]) == 0).all()
    assert scale[2].isnan().all()
    others = torch.tensor([0, 1, 3, 4, 5], device=device)
    assert_equal(as_bits(codes)[others], as_bits(clean[0])[others])
    assert_equal(scale[others], clean[1][others])
    out, lse = one_key(codes, scale, torch.bfloat16)
    assert out[2].isnan().all()
    assert lse[2].isnan().all()
    assert out[others].isfinite().all()


@every_dtype
def test_large_values_saturate(kv_dtype: str, device: str) -> None:
    """No NaN code and no infinite scale, up to the largest numbers of bf16."""
    rows = torch.tensor([3.3e38, 1e5, 448.0, 65504.0, 2e-30], device=device)
    rows = rows[:, None] * torch.linspace(-1, 1, 64, device=device)
    codes, scale = append(rows, kv_dtype)
    assert scale.isfinite().all()
    if kv_dtype == "e4m3":
        assert ((as_bits(codes) & 0x7F) != 0x7F).all()
        assert (codes.float().abs().amax(1) == 448).all()
    bound = torch.full_like(rows, 65504.0 if kv_dtype == "int4" else INF)
    wanted = rows.clamp(-bound, bound).double()
    largest = wanted.abs().amax(1, keepdim=True)
    error = (dequantize_kv(codes, scale, torch.float64) - wanted).abs()
    assert (error <= largest * 0.07 + (2.0**-14 if kv_dtype == "int4" else 0.0)).all()


@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        KvAppendCase,
        num_tokens=st.integers(0, 30),
        num_kv_heads=st.integers(1, 4),
        head_dim=st.integers(1, 20).map(lambda half: 2 * half),
        page_size=st.integers(1, 9),
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        skip_every=st.sampled_from([None, 1, 2, 3]),
        packed=st.booleans(),
        kv_dtype=st.sampled_from(list(QUANTIZED_KV)),
    )
)
def test_append_any_shape(case: KvAppendCase) -> None:
    check_values(kv_append, case, "cpu")


@every_dtype
def test_append_to_any_layout(kv_dtype: str, device: str) -> None:
    case = KvAppendCase(7, 2, 64, 4, torch.float16, kv_dtype=kv_dtype)
    for index in (0, 1, 2, 3, 5, 6):
        tensor = case.make(device)[0][index]
        for name, layout in hostile.odd_strides(tensor):
            args = list(case.make(device)[0])
            pairs = kv_dtype == "int4" and index > 4
            if (layout.stride(-1) != 1 and (index < 4 or pairs)) or name == "expanded":
                continue
            if pairs and name == "offset":
                continue  # pairs at odd addresses: an error
            args[index] = layout
            expected = case.reference(*args)
            kv_append(*args)
            found = (*args[2:4], *args[5:])
            for actual, wanted in zip(found, expected, strict=True):
                assert_equal(as_bits(actual), as_bits(wanted), name=f"{index} {name}")


draw_case = st.builds(
    PagedAttentionCase,
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 130)), max_size=3).map(tuple),
    num_q_heads=st.sampled_from([6, 12]),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    head_dim=st.integers(1, 12).map(lambda eighths: 8 * eighths),
    page_size=st.integers(1, 70),
    # Not fp32, which the contract's cases have: there the worst of a few rows that cancel decides,
    # ours or the baseline's, by chance.
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 100),
    softcap=st.sampled_from([0.0, 2.0]),
    kv_dtype=st.sampled_from(list(QUANTIZED_KV)),
)


@settings(max_examples=40, deadline=None)
@given(case=draw_case)
def test_attention_to_any_quantised_cache(case: PagedAttentionCase) -> None:
    check_values(paged_attention, case, "cpu")


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_attention_on_the_gpu(kv_dtype: str, head_dim: int, page_size: int, group: int) -> None:
    """Ragged lengths with one and with several queries, NaN in unused slots and their scales."""
    dtype = torch.bfloat16 if (group + page_size) % 2 else torch.float16
    lengths = {
        "decode": ((1, 300), (1, 1), (1, 0), (1, 17), (1, 129)),
        "steps": ((4, 90), (1, 33), (3, 3), (2, 64)),
        "mixed": MIXED,
    }
    for sequences in lengths.values():
        case = PagedAttentionCase(
            sequences, 2 * group, 2, head_dim, page_size, dtype, kv_dtype=kv_dtype
        )
        for options in ({}, {"window": 21}, {"softcap": 3.0}):
            check_values(paged_attention, replace(case, **options), "cuda")


@every_dtype
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_any_size(kv_dtype: str, queries: int, dtype: torch.dtype, device: str) -> None:
    """Values a thousand times larger in some tokens than in others, and all of them tiny or huge:
    neither may leave the range of the weights."""
    case = PagedAttentionCase(((queries, 150),), 4, 2, 64, 16, dtype, kv_dtype=kv_dtype)
    for factor in (1.0, 2.0**-12, 2.0**5) if kv_dtype == "int4" else (1.0, 2.0**-20, 2.0**5):
        args = bind(schema_of("paged_attention"), *case.make(device))
        generator = torch.Generator().manual_seed(7)
        spread = 2.0 ** torch.randint(-9, 1, args["v_scale"].shape[:3], generator=generator)
        spread = spread.to(device) * factor
        scale = args["v_scale"]
        (scale[..., 0] if kv_dtype == "int4" else scale).mul_(spread)
        args["softcap"] = 4.0  # so that every key has a say
        baseline = paged_attention_ref(**args, dtype=torch.float32, weights_dtype=dtype)
        out, _ = paged_attention(**args)
        assert_close_to_reference(out, paged_attention_ref(**args)[0], baseline[0].to(dtype))


@every_dtype
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-20, 2.0**30, 2.0**100])
def test_queries_of_any_size(kv_dtype: str, queries: int, factor: float, device: str) -> None:
    """A factor of q that the scale takes back changes nothing: q does not have to fit into fp16."""
    case = PagedAttentionCase(((queries, 90),), 4, 2, 64, 16, kv_dtype=kv_dtype)
    args = bind(schema_of("paged_attention"), *case.make(device))
    expected = paged_attention(**args | {"scale": 0.125})
    found = paged_attention(**args | {"scale": 0.125 / factor, "q": args["q"] * factor})
    for actual, wanted in zip(found, expected, strict=True):
        assert_equal(actual, wanted)


@every_dtype
@pytest.mark.parametrize("queries", [1, 20])
def test_a_query_of_zeros_sees_all_keys_alike(kv_dtype: str, queries: int, device: str) -> None:
    case = PagedAttentionCase(((queries, 90),), 4, 2, 64, 16, causal=False, kv_dtype=kv_dtype)
    args = bind(schema_of("paged_attention"), *case.make(device))
    _, lse = paged_attention(**args | {"q": torch.zeros_like(args["q"])})
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(90)))


@every_dtype
@pytest.mark.parametrize("queries", [1, 20])
def test_any_strides_of_caches_and_scales(kv_dtype: str, queries: int, device: str) -> None:
    case = PagedAttentionCase(((queries, 50), (1, 9)), 4, 2, 64, 4, kv_dtype=kv_dtype)
    args = bind(schema_of("paged_attention"), *case.make(device))
    expected = paged_attention(**args)
    for name, order in itertools.product(
        ("k_cache", "v_cache", "k_scale", "v_scale"), ((0, 1, 2), (2, 0, 1), (1, 2, 0))
    ):
        tail = tuple(range(3, args[name].dim()))
        inverse = [(*order, *tail).index(axis) for axis in range(args[name].dim())]
        moved = args[name].permute(*order, *tail).contiguous().permute(inverse)
        for actual, wanted in zip(paged_attention(**args | {name: moved}), expected, strict=True):
            assert_equal(actual, wanted, name=f"{name} {order}")


@every_dtype
@pytest.mark.parametrize("queries", [1, 40])
def test_caches_beyond_32_bit_offsets(kv_dtype: str, queries: int, device: str) -> None:
    """Two pages that lie 2^31 bytes apart."""
    dtype = QUANTIZED_KV[kv_dtype]
    row = codes_per_row(64, dtype)
    memory = torch.empty(2**31 + 128, dtype=torch.uint8, device=device).view(dtype)
    caches = [memory.as_strided((2, 1, 1, row), (2**31, row, row, 1), offset) for offset in (0, 64)]
    scales = [empty_kv_scale(2, 1, 1, dtype, device) for _ in caches]
    k, v = (hostile.normal(1, 1, 64, dtype=torch.bfloat16, device=device, seed=s) for s in (0, 1))
    kv_append(k, v, *caches, torch.tensor([1], device=device), *scales)
    for rows, cache, scale in zip((k, v), caches, scales, strict=True):
        codes, expected = quantize_kv(rows, dtype)
        assert_equal(as_bits(cache)[1, 0], as_bits(codes)[0])
        assert_equal(scale[1, 0], expected[0])
    pages = torch.tensor([[1]], dtype=torch.int32, device=device)
    starts = torch.tensor([0, queries], dtype=torch.int32, device=device)
    q = torch.zeros(queries, 1, 64, dtype=torch.bfloat16, device=device)
    out, _ = paged_attention(
        q, *caches, pages, pages[0], starts, *scales, max_seqlen_q=queries, causal=False
    )
    exact = dequantize_kv(codes, expected, torch.float32)
    torch.testing.assert_close(out.float(), exact.expand(queries, 1, 64), rtol=2**-7, atol=0.0)


@pytest.mark.gpu
@every_dtype
def test_a_cuda_graph_of_append_and_attention(kv_dtype: str) -> None:
    """Captured as the first call; replayed with other keys."""
    case = PagedAttentionCase(((1, 300), (1, 40)), 8, 2, 128, 16, kv_dtype=kv_dtype)
    args = bind(schema_of("paged_attention"), *case.make("cuda"))
    k, v = (hostile.normal(2, 2, 128, dtype=torch.bfloat16, device="cuda", seed=s) for s in (8, 9))
    last = (args["seq_lens"] - 1).long()
    pages = args["page_table"].gather(1, (last // 16)[:, None])[:, 0].long()
    caches = [args[name] for name in ("k_cache", "v_cache")]
    scales = [args[name] for name in ("k_scale", "v_scale")]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kv_append(k, v, *caches, pages * 16 + last % 16, *scales)
        out, lse = paged_attention(**args)
    for factor in (1.0, -3.0):
        k.mul_(factor), v.mul_(factor)
        graph.replay()
        expected = paged_attention(**args)
        assert_equal(out, expected[0])
        assert_equal(lse, expected[1])
        codes, scale = quantize_kv(k, QUANTIZED_KV[kv_dtype])
        assert_equal(as_bits(caches[0])[pages, last % 16], as_bits(codes))
        assert_equal(scales[0][pages, last % 16], scale)


CASE = PagedAttentionCase(((3, 20), (1, 9)), 4, 2, 64, 4, torch.float16, kv_dtype="int8")
INT4 = replace(CASE, kv_dtype="int4")


def wrong(case: PagedAttentionCase, **changes: Any) -> dict[str, Any]:
    return bind(schema_of("paged_attention"), *case.make("cpu")) | changes


ERRORS = [
    (wrong(CASE, k_scale=None), "k_scale must be given for a cache of int8, got None"),
    (wrong(CASE, v_scale=None), "v_scale must be given for a cache of int8, got None"),
    (
        wrong(replace(CASE, kv_dtype=None), v_scale=torch.ones(11, 4, 2)),
        "v_scale must be None for a cache of float16, got a tensor",
    ),
    (wrong(CASE, k_scale=torch.ones(11, 4, 2).half()), "k_scale must be float32, got float16"),
    (
        wrong(CASE, k_scale=torch.ones(11, 4, 3)),
        r"k_scale must be \[NP, P, HKV\] = \[11, 4, 2\], got \[11, 4, 3\]",
    ),
    (
        wrong(CASE, v_cache=torch.zeros(11, 4, 2, 64, dtype=torch.uint8)),
        "v_cache must be int8, got uint8",
    ),
    (
        wrong(INT4, k_cache=torch.zeros(11, 4, 2, 64, dtype=torch.uint8)),
        r"k_cache must be \[NP, P, HKV, D / 2\] = \[11, 4, 2, 32\], got \[11, 4, 2, 64\]",
    ),
    (
        wrong(INT4, v_scale=torch.ones(11, 4, 2, dtype=torch.float16)),
        r"v_scale must be \[NP, P, HKV, 2\] = \[11, 4, 2, 2\], got \[11, 4, 2\]",
    ),
    (wrong(INT4, v_scale=torch.ones(11, 4, 2, 2)), "v_scale must be float16, got float32"),
    (
        wrong(INT4, v_scale=torch.ones(11, 4, 2, 3, dtype=torch.float16)[..., 1:]),
        "v_scale must have rows that start at multiples of 4 bytes",
    ),
    (
        wrong(INT4, v_scale=torch.ones(2, 11, 4, 2, dtype=torch.float16).permute(1, 2, 3, 0)),
        "v_scale must have stride 1 in its last dimension",
    ),
    (
        wrong(CASE, k_cache=torch.zeros(11, 4, 2, 64, dtype=torch.int16)),
        "k_cache must be float16, float8_e4m3fn, int8 or uint8, got another dtype",
    ),
]


@pytest.mark.parametrize(("args", "message"), ERRORS)
def test_errors(args: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"effllm::paged_attention: {message}"):
        paged_attention(**args)


def test_append_errors() -> None:
    k, v, *rest = KvAppendCase(3, 2, 7, 4, kv_dtype="int8").make("cpu")[0]
    bytes_ = torch.zeros(3, 4, 2, 3, dtype=torch.uint8)
    pairs = torch.zeros(3, 4, 2, 2, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="k_cache of uint8, two codes a byte, needs an even D"):
        kv_append(k, v, bytes_, bytes_, rest[2], pairs, pairs)
    with pytest.raises(RuntimeError, match="k_scale must be given for a cache of int8, got None"):
        kv_append(k, v, *rest[:3])


@pytest.mark.gpu
@every_dtype
def test_misaligned_rows_are_a_named_error_on_the_gpu(kv_dtype: str) -> None:
    case = replace(CASE, kv_dtype=kv_dtype)
    args = bind(schema_of("paged_attention"), *case.make("cuda"))
    cache = args["k_cache"]
    memory = torch.zeros(cache.numel() + 1, dtype=torch.uint8, device="cuda")
    args["k_cache"] = memory[1:].view(cache.shape).view(cache.dtype)
    with pytest.raises(RuntimeError, match="k_cache must have rows that start at multiples of 16"):
        paged_attention(**args)

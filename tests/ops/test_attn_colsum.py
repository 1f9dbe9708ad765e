"""attn_colsum beyond the cases of the contract: a dense matrix, chunks, invariances, errors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_on_cpu import TensorArgument, as_argument, compiled
from torch import Tensor

from effllm.ops import attn_colsum, paged_attention
from effllm.ops.attn_colsum import attn_colsum_ref
from effllm.testing import hostile
from effllm.testing.cases.attn_colsum import CASES, CPU_CASES, MIXED, AttnColsumCase
from effllm.testing.compare import assert_close_to_reference, assert_equal
from effllm.testing.run import bind, check_values, schema_of

CASE = AttnColsumCase(((6, 20), (9, 9)), 4, 2, 64, 4, torch.float16)


def named(case: AttnColsumCase, device: str) -> dict[str, Any]:
    return bind(schema_of("attn_colsum"), *case.make(device))


def prompt(
    queries: int, keys: int, heads: int, kv_heads: int, dim: int, device: str
) -> dict[str, Any]:
    """One sequence whose keys lie in a single page, in fp16; without lse and max_seqlen_k."""
    shapes = ((queries, heads, dim), *((1, keys, kv_heads, dim),) * 2)
    q, k, v = (
        hostile.normal(*shape, dtype=torch.float16, device=device, seed=seed)
        for seed, shape in enumerate(shapes)
    )
    return {
        "q": q,
        "k_cache": k,
        "v_cache": v,
        "page_table": torch.zeros(1, 1, dtype=torch.int32, device=device),
        "seq_lens": torch.tensor([keys], dtype=torch.int32, device=device),
        "cu_seqlens_q": torch.tensor([0, queries], dtype=torch.int32, device=device),
    }


def after_attention(args: dict[str, Any], **options: Any) -> Tensor:
    """The sums that go with what paged_attention says of the same."""
    args = dict(args)
    _, lse = paged_attention(**args, max_seqlen_q=len(args["q"]))
    del args["v_cache"]
    return attn_colsum(**args, lse=lse, **options)


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.id)
def test_fp32_on_the_cpu(case: AttnColsumCase) -> None:
    check_values(attn_colsum, case, "cpu")


@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        AttnColsumCase,
        st.lists(st.tuples(st.integers(0, 80), st.integers(0, 150)), max_size=4).map(tuple),
        num_q_heads=st.sampled_from([6, 12]),
        num_kv_heads=st.sampled_from([1, 2, 3, 6]),
        head_dim=st.integers(1, 12).map(lambda eighths: 8 * eighths),
        page_size=st.integers(1, 70),
        dtype=st.sampled_from([torch.float16, torch.bfloat16]),
        last_n=st.none() | st.integers(1, 90),
        softcap=st.sampled_from([0.0, 2.0]),
        padding=st.integers(0, 2),
        sinks=st.booleans(),
        per_head=st.booleans(),
    ),
    seed=st.integers(0, 5),
)
def test_any_problem(case: AttnColsumCase, seed: int) -> None:
    """Scores and lse are over a thousand at times: a step of fp32 is then 1e-4, and so is what it
    makes of a weight. The baseline has an lse that is a step off."""
    args, kwargs = case.make("cpu", seed)
    lse = args[5]
    step = torch.nextafter(lse, torch.full_like(lse, torch.inf)).where(lse.isfinite(), lse)
    baseline = case.baseline(*args[:5], step, *args[6:], **kwargs)
    reference = case.reference(*args, **kwargs)
    assert_close_to_reference(attn_colsum(*args, **kwargs), reference, baseline)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("last_n", [None, 1, 64])
def test_sums_are_those_of_the_dense_matrix(group: int, last_n: int | None, device: str) -> None:
    """Of softmax with a causal mask, with keys repeated for their query heads."""
    queries, keys, kv_heads, dim = 150, 200, 2, 64
    args = prompt(queries, keys, group * kv_heads, kv_heads, dim, device)
    sums = after_attention(args, max_seqlen_k=keys, last_n=last_n)
    k = args["k_cache"][0].double().repeat_interleave(group, dim=1)
    products = torch.einsum("qhd,khd->hqk", args["q"].double(), k) / dim**0.5
    seen = torch.ones(queries, keys, device=device).tril(keys - queries).bool()
    weights = products.masked_fill(~seen, -torch.inf).softmax(-1)
    counted = weights[:, -last_n:] if last_n else weights
    expected = counted.unflatten(0, (kv_heads, group)).sum((1, 2))[None]
    torch.testing.assert_close(sums.double(), expected, rtol=3e-5, atol=1e-6)


def test_each_query_gives_one_in_all(device: str) -> None:
    args = prompt(300, 300, 8, 2, 64, device)
    sums = after_attention(args, max_seqlen_k=300)
    totals = torch.full((1, 2), 300.0 * 4, device=device)
    torch.testing.assert_close(sums.sum(-1), totals, rtol=1e-5, atol=0)
    last = after_attention(args, max_seqlen_k=300, last_n=64)
    torch.testing.assert_close(last.sum(-1), totals * 64 / 300, rtol=1e-5, atol=0)


def test_keys_that_are_alike_get_what_their_age_gives(device: str) -> None:
    """Key j gets 1 / (i + 1) of each query i from j on."""
    queries = 100
    args = prompt(queries, queries, 2, 1, 32, device)
    args["q"].zero_()
    sums = after_attention(args, max_seqlen_k=queries)
    given = 2.0 / torch.arange(1, queries + 1, device=device).double()
    expected = given.flip(0).cumsum(0).flip(0)[None, None]
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=0)


def test_sums_of_chunks_add_up(device: str) -> None:
    """A prompt in pieces, each behind the keys of those before."""
    args = prompt(230, 230, 6, 3, 64, device)
    whole = after_attention(args, max_seqlen_k=230)
    total = torch.zeros_like(whole)
    for start, end in ((0, 64), (64, 65), (65, 200), (200, 230)):
        ends = torch.tensor([0, end - start], dtype=torch.int32, device=device)
        chunk = args | {"q": args["q"][start:end], "cu_seqlens_q": ends}
        chunk["seq_lens"] = torch.tensor([end], dtype=torch.int32, device=device)
        part = after_attention(chunk, max_seqlen_k=230)
        assert (part[..., end:] == 0).all()
        total += part
    torch.testing.assert_close(total, whole, rtol=2e-5, atol=1e-6)


def test_sequences_are_apart_on_the_cpu() -> None:
    args = named(AttnColsumCase(MIXED, 6, 3, 64, 16), "cpu")
    together = attn_colsum(**args)
    starts = args["cu_seqlens_q"].tolist()
    for index in range(len(MIXED)):
        rows, tokens = slice(index, index + 1), slice(starts[index], starts[index + 1])
        alone = args | {name: args[name][rows] for name in ("page_table", "seq_lens")}
        alone |= {name: args[name][tokens] for name in ("q", "lse")}
        alone["cu_seqlens_q"] = torch.tensor([0, MIXED[index][0]], dtype=torch.int32)
        assert_equal(attn_colsum(**alone), together[rows])


def test_the_number_of_threads_does_not_matter_on_the_cpu() -> None:
    args = named(AttnColsumCase(((300, 1200), (9, 9)), 6, 3, 64, 16), "cpu")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(attn_colsum(**args))
    finally:
        torch.set_num_threads(before)
    assert_equal(*results)


@pytest.mark.parametrize("name", ["q", "k_cache", "page_table", "lse"])
def test_any_strides(name: str, device: str) -> None:
    args = named(CASE, device)
    for layout, tensor in hostile.odd_strides(args[name]):
        # Caches with rows that are not 16-byte aligned are an error on a GPU.
        if tensor.stride(-1) != 1 or (device == "cuda" and (name, layout) == ("k_cache", "offset")):
            continue
        if (name, layout) == ("page_table", "expanded"):
            continue  # a table row for the other sequence's length
        dense = attn_colsum(**args | {name: tensor.contiguous()})
        assert_equal(attn_colsum(**args | {name: tensor}), dense, name=layout)


def test_caches_beyond_32_bit_offsets(device: str) -> None:
    """Two pages that lie 2^31 elements apart."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    k_cache = memory.as_strided((2, 1, 1, 32), (2**31, 32, 32, 1), 0)
    k_cache[1] = 1.0
    q = torch.ones(1, 2, 32, dtype=torch.bfloat16, device=device)
    pages = torch.tensor([[1]], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    lse = torch.full((1, 2), 32**0.5, device=device)
    sums = attn_colsum(q, k_cache, pages, pages[0], starts, lse, max_seqlen_k=1)
    assert sums.item() == pytest.approx(2.0, rel=1e-5)


def test_nan_reaches_the_keys_that_its_query_sees(device: str) -> None:
    args = prompt(70, 70, 2, 2, 64, device)
    args["q"][40, 1] = float("nan")
    sums = after_attention(args, max_seqlen_k=70)
    assert sums[0, 1, :41].isnan().all()
    assert sums[0, 0].isfinite().all()
    assert sums[0, 1, 41:].isfinite().all()


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_lengths() -> None:
    args = named(AttnColsumCase(((90, 900), (90, 900)), 8, 2, 128, 16), "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = attn_colsum(**args)
    for seq_lens in ((900, 900), (900, 100), (0, 400)):
        args["seq_lens"].copy_(torch.tensor(seq_lens))
        exact = attn_colsum_ref(**args)
        graph.replay()
        torch.testing.assert_close(sums.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_the_same_bits_each_time() -> None:
    args = named(AttnColsumCase(((300, 900), (90, 90)), 32, 8, 128, 16), "cuda")
    expected = attn_colsum(**args)
    for _ in range(20):
        assert_equal(attn_colsum(**args), expected)


@pytest.mark.gpu
@pytest.mark.sanitizer
def test_lengths_out_of_range_are_clamped_on_the_gpu() -> None:
    args = named(CASE, "cuda")
    expected = attn_colsum(**args)
    assert_equal(attn_colsum(**args | {"max_seqlen_k": 7}), expected[..., :7])
    args["page_table"] = args["page_table"][:, :5]
    args["seq_lens"] = torch.tensor([2**31 - 1, 9], dtype=torch.int32, device="cuda")
    assert_equal(attn_colsum(**args), expected)


def wrong(**changes: Any) -> dict[str, Any]:
    return named(CASE, "cpu") | changes


HALF = torch.float16
ERRORS = [
    (wrong(q=torch.ones(15, 256, dtype=HALF)), r"q must be \[T, HQ, D\] = .*, got \[15, 256\]"),
    (wrong(lse=torch.ones(15, 4, dtype=HALF)), "lse must be float32, got float16"),
    (wrong(lse=torch.ones(15, 2)), r"lse must be \[T, HQ\] = \[15, 4\], got \[15, 2\]"),
    (wrong(lse=torch.ones(4, 15).mT), "lse must have stride 1 in its last dimension"),
    (
        wrong(cu_seqlens_q=torch.ones(2, dtype=torch.int32)),
        r"cu_seqlens_q must be \[B \+ 1\] = \[3\], got \[2\]",
    ),
    (wrong(max_seqlen_k=-1), r"max_seqlen_k must be in \[0, 2\^31\), got -1"),
    (wrong(last_n=0), "last_n must be at least 1 or None, got 0"),
    (wrong(k_scale=torch.ones(1, 1, 1)), "k_scale must be None for a cache of float16"),
    (wrong(sinks=torch.ones(3)), r"sinks must be \[HQ\] = \[4\], got \[3\]"),
    (wrong(scale=float("nan")), "scale must be finite, got nan"),
]
CPU_ERRORS = [
    (wrong(max_seqlen_k=19), "max_seqlen_k must be at least the longest of seq_lens, 20, got 19"),
    (
        wrong(page_table=torch.full((2, 7), 99, dtype=torch.int32)),
        r"page_table\[0, 0\] must be in \[0, NP - 1\] = .*, got 99",
    ),
    (
        wrong(cu_seqlens_q=torch.tensor([0, 6, 16], dtype=torch.int32)),
        r"cu_seqlens_q\[2\] must be in .*, got 16",
    ),
]


@pytest.mark.parametrize(("args", "message"), ERRORS + CPU_ERRORS)
def test_errors(args: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"effllm::attn_colsum: {message}"):
        attn_colsum(**args)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k_cache", "lse", "page_table", "seq_lens", "cu_seqlens_q"])
def test_mixed_devices_are_a_named_error(name: str) -> None:
    args = {
        key: value.cuda() if isinstance(value, Tensor) else value for key, value in wrong().items()
    }
    args[name] = args[name].cpu()
    with pytest.raises(RuntimeError, match=rf"{name} must be on cuda:0 as q is, got cpu"):
        attn_colsum(**args)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    """attn_colsum as the GPU does it: its own header, on warps whose lanes take turns. With
    ``added_to``, as h2o_attention calls it."""
    library = compiled("attn_colsum.cpp", tmp_path_factory.mktemp("attn_colsum"))

    def call(
        *args: Tensor,
        sinks: Tensor | None = None,
        max_seqlen_k: int,
        last_n: int | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        added_to: Tensor | None = None,
    ) -> Tensor:
        shape = (len(args[3]), args[1].shape[2], max_seqlen_k)
        out = hostile.poison_(torch.empty(shape)) if added_to is None else added_to
        tensors = (*args, *(None,) * (7 - len(args)), sinks, out)
        library.attn_colsum_on_warps(
            (TensorArgument * 9)(*map(as_argument, tensors)),
            ctypes.c_int64(max_seqlen_k),
            ctypes.c_int64(last_n or 0),
            ctypes.c_double(args[0].shape[-1] ** -0.5 if scale is None else scale),
            ctypes.c_double(softcap),
            ctypes.c_bool(added_to is not None),
        )
        return out

    return call


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.dtype == torch.bfloat16 and case.sequences],
    ids=lambda case: case.id,
)
def test_the_kernel(case: AttnColsumCase, kernel: Callable[..., Tensor]) -> None:
    check_values(kernel, case, "cpu")


def test_the_kernel_adds_to_what_is_there(kernel: Callable[..., Tensor]) -> None:
    """And leaves alone what lies behind the last key."""
    args, kwargs = AttnColsumCase(MIXED, 6, 3, 64, 16, per_head=True).make("cpu")
    sums = attn_colsum_ref(*args, **kwargs)
    before = torch.rand(sums.shape)
    after = kernel(*args, **kwargs, added_to=before.clone())
    torch.testing.assert_close((after - before).double(), sums, rtol=1e-4, atol=1e-5)
    unused = torch.arange(sums.shape[2]) >= args[3][..., None]
    assert_equal(after[unused], before[unused])


def test_the_kernel_clamps_what_is_out_of_range(kernel: Callable[..., Tensor]) -> None:
    args, kwargs = AttnColsumCase(((6, 20), (9, 9)), 4, 2, 64, 4).make("cpu")
    expected = kernel(*args, **kwargs)
    assert_equal(kernel(*args, **kwargs | {"max_seqlen_k": 7}), expected[..., :7])
    table, seq_lens = args[2][:, :5], torch.tensor([2**31 - 1, 9], dtype=torch.int32)
    assert_equal(kernel(*args[:2], table, seq_lens, *args[4:], **kwargs), expected)

"""paged_attention beyond the cases of the contract: invariances, layouts, odd values."""

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

from effllm.ops import paged_attention
from effllm.ops.paged_attention import paged_attention_ref
from effllm.testing import hostile
from effllm.testing.cases.paged_attention import CPU_CASES, MIXED, PagedAttentionCase
from effllm.testing.compare import assert_close_to_reference, assert_equal
from effllm.testing.run import bind, check_values, schema_of

CASE = PagedAttentionCase(((3, 20), (1, 9)), 4, 2, 64, 4, torch.float16)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def named(case: PagedAttentionCase, device: str) -> dict[str, Any]:
    return bind(schema_of("paged_attention"), *case.make(device))


def tiny(queries: Tensor, keys: Tensor, values: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """One sequence, one head: rows of scalars, each in the first of 8 dimensions. Scale 1."""

    def spread(column: Tensor) -> Tensor:
        return torch.nn.functional.pad(column[:, None, None], (0, 7))

    device = queries.device
    pages = torch.zeros(1, 1, dtype=torch.int32, device=device)
    seq_lens = torch.tensor([len(keys)], dtype=torch.int32, device=device)
    cu_seqlens_q = torch.tensor([0, len(queries)], dtype=torch.int32, device=device)
    out, lse = paged_attention(
        spread(queries),
        spread(keys)[None],
        spread(values)[None],
        pages,
        seq_lens,
        cu_seqlens_q,
        max_seqlen_q=len(queries),
        scale=1.0,
        **options,
    )
    return out[:, 0, 0], lse[:, 0]


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.id)
def test_fp32_on_the_cpu(case: PagedAttentionCase) -> None:
    check_values(paged_attention, case, "cpu")


lengths = st.tuples(st.integers(0, 12), st.integers(0, 150))
draw_case = st.builds(
    PagedAttentionCase,
    st.lists(lengths, max_size=4).map(tuple),
    num_q_heads=st.sampled_from([6, 12]),
    num_kv_heads=st.sampled_from([1, 2, 3, 6]),
    head_dim=st.integers(1, 12).map(lambda eighths: 8 * eighths),
    page_size=st.integers(1, 70),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 100),
    softcap=st.sampled_from([0.0, 2.0]),
    padding=st.integers(0, 2),
    sinks=st.booleans(),
    alibi=st.booleans(),
    per_head=st.booleans(),
    split_size=st.sampled_from([None, 64, 128]),
    sink_tokens=st.sampled_from([0, 1, 4, 70]),
    tree=st.booleans(),
).map(lambda case: replace(case, causal=case.causal or case.tree))


@settings(max_examples=60, deadline=None)
@given(case=draw_case, seed=st.integers(0, 5))
def test_any_problem(case: PagedAttentionCase, seed: int) -> None:
    args, kwargs = case.make("cpu", seed)
    for actual, reference, baseline in zip(
        paged_attention(*args, **kwargs),
        case.reference(*args, **kwargs),
        case.baseline(*args, **kwargs),
        strict=True,
    ):
        assert_close_to_reference(actual, reference, baseline)


def test_order_of_pages_in_memory_does_not_matter(device: str) -> None:
    args = named(CASE, device)
    expected = paged_attention(**args)
    num_pages = args["k_cache"].shape[0]
    order = torch.randperm(num_pages, device=device)
    for name in ("k_cache", "v_cache"):
        args[name] = args[name][order]
    moved_to = order.argsort().to(torch.int32)
    table = args["page_table"]
    is_page = (table >= 0) & (table < num_pages)
    args["page_table"] = torch.where(is_page, moved_to[table.clamp(0, num_pages - 1).long()], table)
    for actual, wanted in zip(paged_attention(**args), expected, strict=True):
        assert_equal(actual, wanted)


@settings(max_examples=20, deadline=None)
@given(page_sizes=st.tuples(st.integers(1, 80), st.integers(1, 80)), seed=st.integers(0, 5))
def test_page_size_does_not_matter(page_sizes: tuple[int, int], seed: int) -> None:
    """The same keys in pages of two sizes: the same bits on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, 2, 32, generator=generator) for n in (3, 90, 90))
    results = []
    for page_size in page_sizes:
        num_pages = -(-90 // page_size)
        order = torch.randperm(num_pages, generator=generator)
        caches = []
        for tensor in (k, v):
            padded = torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, num_pages * page_size - 90))
            caches.append(padded.view(num_pages, page_size, 2, 32)[order.argsort()])
        page_table = order.to(torch.int32)[None].contiguous()
        k_cache, v_cache = caches
        results.append(
            paged_attention(q, k_cache, v_cache, page_table, int32(90), int32(0, 3), max_seqlen_q=3)
        )
    assert_equal(results[0][0], results[1][0])
    assert_equal(results[0][1], results[1][1])


def test_neighbours_in_the_batch_do_not_matter_on_the_cpu() -> None:
    """A sequence, and even one query of it, gives the same bits alone as in any batch."""
    args = named(PagedAttentionCase(MIXED, window=30), "cpu")
    out, lse = paged_attention(**args)
    starts = args["cu_seqlens_q"].tolist()
    for index, (start, end) in enumerate(itertools.pairwise(starts)):
        for first in {start, max(start, end - 1)}:  # all of its queries, and the last one alone
            alone = args | {
                "q": args["q"][first:end],
                "page_table": args["page_table"][index : index + 1],
                "seq_lens": args["seq_lens"][index : index + 1],
                "cu_seqlens_q": torch.tensor([0, end - first], dtype=torch.int32),
            }
            actual = paged_attention(**alone)
            assert_equal(actual[0], out[first:end])
            assert_equal(actual[1], lse[first:end])


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_the_number_of_threads_does_not_matter_on_the_cpu(kv_dtype: str | None) -> None:
    """With few threads each takes whole tasks, with more they share the splits of one."""
    sequences = ((1, 1500), (3, 1030), (1, 5))
    args = named(PagedAttentionCase(sequences, 8, 2, 64, 16, kv_dtype=kv_dtype), "cpu")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(paged_attention(**args))
    finally:
        torch.set_num_threads(before)
    for actual, wanted in zip(*results, strict=True):
        assert_equal(actual, wanted)


def test_halves_merge_by_their_lse(device: str) -> None:
    """That lse is the natural logarithm of what out was divided by."""
    case = PagedAttentionCase(((5, 64),), 4, 2, 64, 16, torch.float16, causal=False)
    args = named(case, device)
    whole, whole_lse = paged_attention(**args)
    half = args | {"seq_lens": torch.tensor([32], dtype=torch.int32, device=device)}
    first, first_lse = paged_attention(**half)
    second, second_lse = paged_attention(**half | {"page_table": args["page_table"][:, 2:]})
    lse = torch.logaddexp(first_lse.double(), second_lse.double())
    weights = [torch.exp(part.double() - lse)[..., None] for part in (first_lse, second_lse)]
    merged = first.double() * weights[0] + second.double() * weights[1]
    exact, exact_lse = paged_attention_ref(**args)
    assert_close_to_reference(merged, exact, whole, dtype=torch.float16)
    assert_close_to_reference(lse, exact_lse, whole_lse, dtype=torch.float32)


def test_every_query_that_sees_one_key_returns_its_value(device: str) -> None:
    """And 65,537 sequences, more than two of a grid's dimensions may have."""
    batch = 65537
    q = hostile.normal(batch, 2, 64, dtype=torch.float16, device=device)
    k, v = (
        hostile.normal(batch, 1, 1, 64, dtype=torch.float16, device=device, seed=seed)
        for seed in (1, 2)
    )
    pages = torch.randperm(batch, device=device)
    ones = torch.ones(batch, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    out, lse = paged_attention(
        q, k, v, pages.to(torch.int32)[:, None], ones, starts, max_seqlen_q=1
    )
    assert_equal(out, v[pages, 0].expand(batch, 2, 64).contiguous())
    scores = (q.double() * k[pages, 0].double()).sum(-1) / 8
    torch.testing.assert_close(lse.double(), scores, rtol=1e-5, atol=1e-4)


def test_a_prompt_longer_than_a_grid_is_wide(device: str) -> None:
    """65,537 queries that see two keys each."""
    count = 65537
    v = torch.arange(count + 1, dtype=torch.float32, device=device).remainder(512)
    v = v.to(torch.float16)[None, :, None, None].expand(1, -1, 1, 64).contiguous()
    q = torch.zeros(count, 1, 64, dtype=torch.float16, device=device)
    tables = (
        torch.zeros(1, 1, dtype=torch.int32, device=device),
        torch.tensor([count + 1], dtype=torch.int32, device=device),
        torch.tensor([0, count], dtype=torch.int32, device=device),
    )
    out, lse = paged_attention(q, torch.zeros_like(v), v, *tables, max_seqlen_q=count, window=2)
    pairs = v[0, :, 0].float()
    assert_equal(out[:, 0], ((pairs[:-1] + pairs[1:]) / 2).to(torch.float16))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(2)))


def test_more_queries_than_keys(device: str) -> None:
    """Bottom-right alignment: the first rows stand before all keys."""
    args = named(PagedAttentionCase(((8, 4),), 4, 2, 64, 16, torch.float16), device)
    out, lse = paged_attention(**args)
    assert (out[:4] == 0).all()
    assert (lse[:4] == -math.inf).all()
    assert (lse[4:] > -math.inf).all()
    everything, _ = paged_attention(**args | {"causal": False})
    assert (everything != 0).any(-1).all()


def test_a_masked_key_never_wins(device: str) -> None:
    """Scores far below any sentinel that could stand for -inf, beside a masked one that is 0."""
    half: dict[str, Any] = {"dtype": torch.float16, "device": device}
    queries, keys = torch.tensor([-20000.0, 1.0], **half), torch.tensor([50.0, 0.0], **half)
    out, lse = tiny(queries, keys, torch.tensor([1.0, 100.0], **half))
    assert out[0].item() == 1.0
    assert lse[0].item() == pytest.approx(-1e6, rel=1e-6)


def test_infinite_scores(device: str) -> None:
    half: dict[str, Any] = {"dtype": torch.float16, "device": device}
    values = torch.tensor([3.0, 5.0], **half)
    inf = math.inf
    # -inf is a weight of 0; a row of nothing else has no weight at all.
    out, lse = tiny(torch.tensor([-1.0], **half), torch.tensor([inf, -2.0], **half), values)
    assert (out.item(), lse.item()) == (5.0, pytest.approx(2.0, rel=1e-6))
    out, lse = tiny(torch.tensor([-1.0], **half), torch.tensor([inf, inf], **half), values)
    assert (out.item(), lse.item()) == (0.0, -inf)
    # inf - inf: as softmax in torch.
    out, _ = tiny(torch.tensor([1.0], **half), torch.tensor([inf, 2.0], **half), values)
    assert out.isnan().all()


def test_softcap_bounds_scores(device: str) -> None:
    half: dict[str, Any] = {"dtype": torch.float16, "device": device}
    arguments = torch.tensor([100.0], **half), torch.tensor([100.0], **half)
    _, lse = tiny(*arguments, torch.tensor([1.0], **half), softcap=2.0)
    torch.testing.assert_close(lse, torch.full_like(lse, 2.0))


def test_nan_of_one_query_stays_in_its_row(device: str) -> None:
    args = named(PagedAttentionCase(((1, 40), (6, 30)), 4, 2, 64, 16), device)
    clean, _ = paged_attention(**args)
    args["q"][3, 1] = float("nan")
    out, lse = paged_attention(**args)
    assert out[3, 1].isnan().all()
    assert lse[3, 1].isnan()
    hit = torch.zeros(7, 4, dtype=torch.bool, device=device)
    hit[3, 1] = True
    assert_equal(out[~hit], clean[~hit])


def test_nan_of_a_later_key_stays_there_on_the_cpu() -> None:
    """A GPU multiplies whole tiles: there, only slots that no query sees have no influence."""
    args = named(PagedAttentionCase(((6, 30),), 4, 2, 64, 16), "cpu")
    clean, _ = paged_attention(**args)
    page = args["page_table"][0, 1].item()
    args["k_cache"][page, 13] = args["v_cache"][page, 13] = float("nan")  # key 29, the last
    out, _ = paged_attention(**args)
    assert_equal(out[:5], clean[:5])
    assert out[5].isnan().all()


def test_table_entries_before_the_window_are_not_read(device: str) -> None:
    """Pages that slid out of the window may have been given away."""
    args = named(PagedAttentionCase(((2, 40),), 4, 2, 64, 4, window=9), device)
    expected = paged_attention(**args)
    args["page_table"][0, :7] = torch.tensor(hostile.ABSURD_PAGES[0], dtype=torch.int32)
    for actual, wanted in zip(paged_attention(**args), expected, strict=True):
        assert_equal(actual, wanted)


@pytest.mark.parametrize(("queries", "keys"), [(1, 900), (3, 100), (40, 200)])
def test_between_the_first_tokens_and_the_window_nothing_is_read(
    queries: int, keys: int, device: str
) -> None:
    """Nor do what lies there and a cache without it differ: as StreamingLLM evicts it."""
    case = PagedAttentionCase(((queries, keys),), 4, 2, 64, 4, window=33, sink_tokens=6)
    args = named(case, device)
    expected = paged_attention(**args)
    gap = slice(2, (keys - queries - 32) // 4)  # the entries of no visible key
    pages = args["page_table"][0, gap].long()
    for name in ("k_cache", "v_cache"):
        args[name][pages] = float("nan")
    args["page_table"][0, gap] = torch.tensor(hostile.ABSURD_PAGES[0], dtype=torch.int32)
    for actual, wanted in zip(paged_attention(**args), expected, strict=True):
        assert_equal(actual, wanted)
    if queries == 1:  # the seen keys alone: the first 8, of which 6 count, and the window's pages
        table = args["page_table"][:, [0, 1, *range(gap.stop, -(-keys // 4))]]
        fewer = args["seq_lens"] - 4 * (gap.stop - gap.start)
        out, _ = paged_attention(**args | {"page_table": table, "seq_lens": fewer})
        torch.testing.assert_close(out, expected[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sink_tokens", [5, 2**31, 2**62])
def test_first_tokens_without_a_gap_are_no_others(sink_tokens: int, device: str) -> None:
    """Without a window, or where all keys are first ones."""
    for queries in (1, 3, 40):
        case = PagedAttentionCase(((queries, 60),), 4, 2, 64, 16)
        args = named(case, device)
        out, lse = paged_attention(**args)
        assert_equal(paged_attention(**args | {"sink_tokens": sink_tokens})[0], out)
        if sink_tokens > 5:
            args["window"] = 9
            near, near_lse = paged_attention(**args | {"sink_tokens": sink_tokens})
            torch.testing.assert_close(near, out, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(near_lse, lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [2**31, 2**62, 2**63 - 1])
def test_a_huge_window_is_none(window: int, device: str) -> None:
    args = named(CASE, device)
    assert_equal(paged_attention(**args | {"window": window})[0], paged_attention(**args)[0])


def test_default_scale_is_that_of_the_true_head_dim(device: str) -> None:
    args = named(PagedAttentionCase(MIXED, head_dim=72), device)
    expected = paged_attention(**args | {"scale": 1 / math.sqrt(72)})
    assert_equal(paged_attention(**args)[0], expected[0])


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "page_table"])
def test_any_strides(name: str, device: str) -> None:
    args = named(CASE, device)
    for layout, tensor in hostile.odd_strides(args[name]):
        # Caches with rows that are not 16-byte aligned are an error on a GPU, tested below.
        if tensor.stride(-1) != 1 or (device == "cuda" and layout == "offset" and "cache" in name):
            continue
        if (name, layout) == ("page_table", "expanded"):
            continue  # a table row for the other sequence's length
        dense = paged_attention(**args | {name: tensor.contiguous()})
        assert_equal(paged_attention(**args | {name: tensor})[0], dense[0], name=layout)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 1, 3), (1, 2, 0, 3)])
def test_any_order_of_the_caches_in_memory(order: tuple[int, ...], device: str) -> None:
    """K and V each in its own."""
    args = named(CASE, device)
    expected = paged_attention(**args)
    inverse = [order.index(axis) for axis in range(4)]
    args["k_cache"] = args["k_cache"].permute(order).contiguous().permute(inverse)
    assert_equal(paged_attention(**args)[0], expected[0])
    args["v_cache"] = args["v_cache"].permute(order).contiguous().permute(inverse)
    assert_equal(paged_attention(**args)[0], expected[0])


def test_q_as_a_slice_of_a_packed_projection(device: str) -> None:
    args = named(CASE, device)
    qkv = hostile.normal(4, 8, 64, dtype=torch.float16, device=device, seed=9)
    expected = paged_attention(**args | {"q": qkv[:, 2:6].contiguous()})
    assert_equal(paged_attention(**args | {"q": qkv[:, 2:6]})[0], expected[0])


def test_caches_beyond_32_bit_offsets(device: str) -> None:
    """Two pages that lie 2^31 elements apart."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    k_cache, v_cache = (
        memory.as_strided((2, 1, 1, 32), (2**31, 32, 32, 1), offset) for offset in (0, 32)
    )
    k_cache[1], v_cache[1] = 1.0, 7.0
    q = torch.ones(1, 1, 32, dtype=torch.bfloat16, device=device)
    pages = torch.tensor([[1]], dtype=torch.int32, device=device)
    seq_lens, starts = pages[0], torch.tensor([0, 1], dtype=torch.int32, device=device)
    out, _ = paged_attention(q, k_cache, v_cache, pages, seq_lens, starts, max_seqlen_q=1)
    assert (out == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 20])
def test_a_cuda_graph_follows_the_lengths(queries: int) -> None:
    """Captured as the first call, at 37 keys; replayed with others. Nothing is planned ahead."""
    longest = PagedAttentionCase(((queries, 900), (queries, 900)), 8, 2, 128, 16)
    args = named(longest, "cuda")
    args["seq_lens"].fill_(37)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = paged_attention(**args)
    for seq_lens in ((37, 37), (900, 1), (0, 400)):
        args["seq_lens"].copy_(torch.tensor(seq_lens))
        graph.replay()
        for actual, wanted in zip(results, paged_attention(**args), strict=True):
            assert_equal(actual, wanted)


PER_HEAD = PagedAttentionCase(((3, 20), (1, 9), (40, 70)), 4, 2, 64, 4, per_head=True)


def test_equal_tables_of_heads_are_one_table(device: str) -> None:
    """To the bit on the CPU; a GPU shares out the keys of either alike."""
    for case in (CASE, PagedAttentionCase(((1, 900), (40, 300)), 4, 2, 128, 16)):
        args = named(case, device)
        expected = paged_attention(**args)
        args["page_table"] = args["page_table"][:, None].repeat(1, 2, 1)
        args["seq_lens"] = args["seq_lens"][:, None].repeat(1, 2)
        for actual, wanted in zip(paged_attention(**args), expected, strict=True):
            assert_equal(actual, wanted)


def test_a_head_without_keys_is_zero_beside_others(device: str) -> None:
    """In decoding and in a prompt: its rows alone."""
    for queries in (1, 3, 40):
        args = named(PagedAttentionCase(((queries, 50),) * 3, 6, 3, 64, 16, per_head=True), device)
        full, _ = paged_attention(**args)
        args["seq_lens"] = args["seq_lens"].clone()
        args["seq_lens"][1, 1] = 0
        with hostile.nan_allocations():
            out, lse = paged_attention(**args)
        tokens = slice(queries, 2 * queries)
        assert (out[tokens, 2:4] == 0).all()
        assert (lse[tokens, 2:4] == -math.inf).all()
        unharmed = torch.ones(3 * queries, 6, dtype=torch.bool, device=device)
        unharmed[tokens, 2:4] = False
        torch.testing.assert_close(out[unharmed], full[unharmed], rtol=1e-2, atol=1e-2)
        assert lse[unharmed].isfinite().any()


@pytest.mark.parametrize("name", ["page_table", "seq_lens"])
def test_any_strides_of_tables_of_heads(name: str, device: str) -> None:
    args = named(PER_HEAD, device)
    for layout, tensor in hostile.odd_strides(args[name]):
        # An expanded one has the first sequence's tables, or lengths, for all.
        if tensor.stride(-1) != 1 or layout == "expanded":
            continue
        expected = paged_attention(**args)
        for actual, wanted in zip(paged_attention(**args | {name: tensor}), expected, strict=True):
            assert_equal(actual, wanted, name=layout)


def test_a_batch_of_one_table_by_stride_zero(device: str) -> None:
    """Sequences that share all of their pages, as beams of one prompt do."""
    args = named(PagedAttentionCase(((2, 30),) * 3, 4, 2, 64, 4, per_head=True), device)
    for name in ("page_table", "seq_lens"):
        args[name] = args[name][:1].expand_as(args[name])
    args["q"] = args["q"][:2].repeat(3, 1, 1)
    out, _ = paged_attention(**args)
    assert_equal(out[2:4], out[:2])
    assert_equal(out[4:], out[:2])
    exact, _ = paged_attention_ref(**args)
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)

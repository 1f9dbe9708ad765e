"""Trees of draft tokens in paged_attention: every node as its branch alone would have it."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from effllm._host import TokenTree
from effllm.ops import paged_attention
from effllm.ops._kv_codes import QUANTIZED_KV, as_bits
from effllm.ops.paged_attention import paged_attention_ref
from effllm.testing import hostile
from effllm.testing.cases.paged_attention import PagedAttentionCase, tree_words
from effllm.testing.compare import assert_close_to_reference, assert_equal
from effllm.testing.run import bind, schema_of

Results = tuple[Tensor, Tensor]

FORK = [-1, 0, 0, 1, 1, 2, 3, 3, 5, 0]
"""Parents of ten nodes, depths 0 to 3, in no depth-first order."""


def named(case: PagedAttentionCase, device: str) -> dict[str, Any]:
    return bind(schema_of("paged_attention"), *case.make(device))


def words_of(*trees: list[int], device: str = "cpu") -> Tensor:
    """The words of trees that are given by their nodes' parents."""
    words = [
        word for parents in trees for word in TokenTree(range(len(parents)), parents).mask_bits
    ]
    return torch.tensor(words, dtype=torch.int64, device=device)


def assert_same_bits(results: Results, expected: Results) -> None:
    for actual, wanted in zip(results, expected, strict=True):
        assert_equal(actual, wanted)


def assert_right(results: Results, args: dict[str, Any]) -> None:
    """Against float64, by the tolerance law."""
    dtype = args["q"].dtype
    exact = paged_attention_ref(**args)
    out, lse = paged_attention_ref(**args, dtype=torch.float32, weights_dtype=dtype)
    for actual, wanted, baseline in zip(results, exact, (out.to(dtype), lse), strict=True):
        assert_close_to_reference(actual, wanted, baseline)


def branch_of(args: dict[str, Any], node: int) -> dict[str, Any]:
    """Of a call of one sequence, pages of one key: a call without a mask, whose text goes on from
    the keys ahead with the path to a node and nothing else; its last token is the node."""
    count = len(args["q"])
    ahead = int(args["seq_lens"]) - count
    path = [i for i in range(node) if args["tree_mask"][node].item() >> i & 1] + [node]
    columns = [*range(ahead), *(ahead + i for i in path)]
    ints = {"dtype": torch.int32, "device": args["q"].device}
    return {name: value for name, value in args.items() if name != "tree_mask"} | {
        "q": args["q"][path],
        "page_table": args["page_table"][:, columns],
        "seq_lens": torch.tensor([len(columns)], **ints),
        "cu_seqlens_q": torch.tensor([0, len(path)], **ints),
        "max_seqlen_q": len(path),
    }


OPTIONS: list[dict[str, Any]] = [
    {},
    {"sinks": True, "softcap": 4.0},
    {"alibi": True},
    {"window": 1},
    {"window": 3, "alibi": True},
    {"window": 3, "sink_tokens": 5},
    {"window": 20, "sink_tokens": 2},
    {"split_size": 64},
    *({"kv_dtype": kv_dtype, "window": 2} for kv_dtype in QUANTIZED_KV),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ahead", [0, 3, 120])
@pytest.mark.parametrize("heads", [2, 16])
def test_a_node_sees_what_its_branch_alone_would(
    heads: int, ahead: int, options: dict[str, Any], device: str
) -> None:
    """Positions count along the branch, however many siblings stand between its slots."""
    case = PagedAttentionCase(((10, ahead + 10),), heads, 2, 64, 1, torch.float16, **options)
    args = named(case, device) | {"tree_mask": words_of(FORK, device=device)}
    out, lse = paged_attention(**args)
    for node in range(10):
        branch = branch_of(args, node)
        exact, exact_lse = (result[-1] for result in paged_attention_ref(**branch))
        plain, plain_lse = (result[-1] for result in paged_attention(**branch))
        assert_close_to_reference(out[node], exact, plain, dtype=torch.float16)
        assert_close_to_reference(lse[node], exact_lse, plain_lse, dtype=torch.float32)


CHAINS = PagedAttentionCase(((1, 300), (16, 90), (64, 64), (0, 9), (6, 2), (5, 700)), 8, 2, 64)


@pytest.mark.parametrize("options", [*OPTIONS, {"per_head": True}], ids=str)
@pytest.mark.parametrize("words", ["chain", "minus_one"])
def test_a_chain_is_the_causal_order(words: str, options: dict[str, Any], device: str) -> None:
    """To the bit on the CPU; a GPU has other kernels for many rows, and other tiles of keys."""
    fields = {name: getattr(CHAINS, name) for name in ("num_q_heads", "num_kv_heads", "head_dim")}
    args = named(PagedAttentionCase(CHAINS.sequences, **fields, **options), device)
    counts = [queries for queries, _ in CHAINS.sequences]
    mask = torch.full((sum(counts),), -1, device=device)
    if words == "chain":
        mask = words_of(*([*range(-1, n - 1)] for n in counts if n), device=device)
    results = paged_attention(**args, tree_mask=mask)
    if device == "cpu":
        assert_same_bits(results, paged_attention(**args))
    assert_right(results, args)


def test_bits_that_name_no_earlier_token_mean_nothing(device: str) -> None:
    """Those of the node itself, of later nodes, and of nodes that the sequence has not."""
    args = named(PagedAttentionCase(((10, 40), (3, 3)), 8, 2, 64, 16), device)
    words = words_of(FORK, [-1, 0, 0], device=device)
    expected = paged_attention(**args, tree_mask=words)
    node = torch.tensor([*range(10), *range(3)], device=device)
    below = (1 << node) - 1
    assert_same_bits(paged_attention(**args, tree_mask=words & below), expected)
    assert_same_bits(paged_attention(**args, tree_mask=words | ~below), expected)


def test_the_last_bit_is_the_sign(device: str) -> None:
    """Node 63, a leaf right below the root: its word is negative."""
    args = named(PagedAttentionCase(((64, 70),), 4, 2, 64, 1, torch.float16), device)
    args["tree_mask"] = words_of([-1, *[0] * 62, 0], device=device)
    assert int(args["tree_mask"][63]) == 1 - 2**63
    out, lse = paged_attention(**args)
    exact, exact_lse = (result[-1] for result in paged_attention_ref(**branch_of(args, 63)))
    plain, plain_lse = (result[-1] for result in paged_attention(**branch_of(args, 63)))
    assert_close_to_reference(out[63], exact, plain, dtype=torch.float16)
    assert_close_to_reference(lse[63], exact_lse, plain_lse, dtype=torch.float32)


def test_a_node_is_not_seen_by_its_siblings_on_the_cpu() -> None:
    """Not even NaN, in its key or value, nor what it asks for."""
    args = named(PagedAttentionCase(((10, 40),), 4, 2, 64, 16), "cpu")
    args["tree_mask"] = words_of(FORK)
    out, lse = paged_attention(**args)
    page, slot = args["page_table"][0, 31 // 16].item(), 31 % 16  # of node 1
    for name in ("k_cache", "v_cache"):
        args[name][page, slot] = math.nan
    args["q"][1] = math.nan
    spoilt, spoilt_lse = paged_attention(**args)
    below = torch.tensor([node in (1, 3, 4, 6, 7) for node in range(10)])
    assert spoilt[below].isnan().all()
    assert_equal(spoilt[~below], out[~below])
    assert_equal(spoilt_lse[~below], lse[~below])


@pytest.mark.parametrize("queries", [3, 10, 60])
def test_what_siblings_hold_changes_nothing(queries: int, device: str) -> None:
    """Other keys, values and queries beside the path of a node: it says the same, on the CPU to the
    bit; on a GPU rows of a warp are rescaled together."""
    args = named(PagedAttentionCase(((queries, queries + 30),), 4, 2, 64, 1), device)
    generator = torch.Generator().manual_seed(3)
    args["tree_mask"] = tree_words(queries, generator).to(device)
    out, lse = paged_attention(**args)
    node = queries - 1
    word = args["tree_mask"][node].item()
    aside = [i for i in range(node) if not word >> i & 1]
    assert aside
    pages = args["page_table"][0, [30 + i for i in aside]].long()
    for name in ("k_cache", "v_cache"):
        args[name][pages] = args[name][pages].flip(0, 2) * 0.5 - 1
    args["q"][aside] = 1.0
    other, other_lse = paged_attention(**args)
    if device == "cpu":
        assert_equal(other[node], out[node])
        assert_equal(other_lse[node], lse[node])
    torch.testing.assert_close(other[node], out[node], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(other_lse[node], lse[node], rtol=1e-5, atol=1e-5)
    assert (other[aside] != out[aside]).any()


def test_trees_of_a_batch_do_not_meet_on_the_cpu() -> None:
    sizes = (1, 64, 7, 0, 12)
    case = PagedAttentionCase(tuple((n, n + 33) for n in sizes), 8, 2, 64, 16, tree=True)
    args = named(case, "cpu")
    out, lse = paged_attention(**args)
    starts = args["cu_seqlens_q"].tolist()
    for index, count in enumerate(sizes):
        tokens = slice(starts[index], starts[index + 1])
        alone = args | {
            "q": args["q"][tokens],
            "tree_mask": args["tree_mask"][tokens],
            "page_table": args["page_table"][index : index + 1],
            "seq_lens": args["seq_lens"][index : index + 1],
            "cu_seqlens_q": torch.tensor([0, count], dtype=torch.int32),
        }
        assert_same_bits(paged_attention(**alone), (out[tokens], lse[tokens]))


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_the_number_of_threads_does_not_matter_on_the_cpu(kv_dtype: str | None) -> None:
    sequences = ((40, 1500), (3, 1030), (1, 5))
    case = PagedAttentionCase(sequences, 8, 2, 64, 16, kv_dtype=kv_dtype, tree=True)
    args = named(case, "cpu")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(paged_attention(**args))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*results)


def test_pages_that_only_siblings_use_may_move(device: str) -> None:
    """One tree in pages of every size, in any order: a mask counts keys, not slots of pages."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, 2, 32, generator=generator).half() for n in (10, 50, 50))
    words = words_of(FORK, device=device)
    results = []
    for page_size in (1, 3, 16, 64):
        count = -(-50 // page_size)
        order = torch.randperm(count, generator=generator)
        caches = [
            torch.nn.functional.pad(x, (0, 0, 0, 0, 0, count * page_size - 50), value=math.nan)
            .view(count, page_size, 2, 32)[order.argsort()]
            .to(device)
            for x in (k, v)
        ]
        ints = {"dtype": torch.int32, "device": device}
        tables = (
            order.to(**ints)[None].contiguous(),
            torch.tensor([50], **ints),
            torch.tensor([0, 10], **ints),
        )
        results.append(
            paged_attention(q.to(device), *caches, *tables, tree_mask=words, max_seqlen_q=10)
        )
    for result in results[1:]:
        for actual, wanted in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, wanted, rtol=2e-3, atol=2e-3)


def test_a_misaligned_mask(device: str) -> None:
    """Words that begin 8 bytes past what any wider load would need; no others around are read."""
    args = named(PagedAttentionCase(((10, 40), (9, 9)), 8, 2, 64, 16, tree=True), device)
    expected = paged_attention(**args)
    memory = torch.zeros(len(args["tree_mask"]) + 2, dtype=torch.int64, device=device)
    memory[1:-1] = args["tree_mask"]
    assert_same_bits(paged_attention(**args | {"tree_mask": memory[1:-1]}), expected)


def test_words_of_padding_are_not_looked_at(device: str) -> None:
    args = named(PagedAttentionCase(((10, 40), (0, 0)), 8, 2, 64, 16, padding=6, tree=True), device)
    expected = paged_attention(**args)
    args["tree_mask"][10:] = torch.tensor([0, -1, 5, -(2**63), 2**63 - 1, 7], device=device)
    with hostile.nan_allocations():
        out, lse = paged_attention(**args)
    assert_same_bits((out, lse), expected)
    assert (out[10:] == 0).all()
    assert (lse[10:] == -math.inf).all()


def test_table_entries_before_the_window_of_the_root_are_not_read(device: str) -> None:
    """The root stands before all other nodes: what its window has left behind no node sees."""
    case = PagedAttentionCase(((10, 50),), 4, 2, 64, 4, window=9)
    args = named(case, device) | {"tree_mask": words_of(FORK, device=device)}
    expected = paged_attention(**args)
    args["page_table"][0, :8] = torch.tensor(hostile.ABSURD_PAGES[0], dtype=torch.int32)
    assert_same_bits(paged_attention(**args), expected)


def test_verified_drafts_are_what_decoding_one_by_one_gives(device: str) -> None:
    """The path that is kept, after its keys have moved together, read by a call without a mask."""
    case = PagedAttentionCase(((10, 40),), 8, 2, 64, 16, torch.float16, window=20, alibi=True)
    args = named(case, device) | {"tree_mask": words_of(FORK, device=device)}
    out, _ = paged_attention(**args)
    path = [0, 2, 5, 8]
    for name in ("k_cache", "v_cache"):
        where = [(args["page_table"][0, key // 16].item(), key % 16) for key in range(30, 40)]
        for depth, node in enumerate(path):
            args[name][where[depth]] = args[name][where[node]].clone()
    kept = {name: value for name, value in args.items() if name != "tree_mask"}
    for depth, node in enumerate(path):
        now = kept | {
            "q": args["q"][node : node + 1],
            "seq_lens": args["seq_lens"] - 9 + depth,
            "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32, device=device),
            "max_seqlen_q": 1,
        }
        one, _ = paged_attention(**now)
        torch.testing.assert_close(one[0], out[node], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [2, 16, 60])
def test_a_replayed_graph_follows_mask_and_lengths(queries: int) -> None:
    """Nothing of the mask is looked at on the host."""
    sequences = ((queries, 900), (queries, 200))
    args = named(PagedAttentionCase(sequences, 8, 2, 128, 16, tree=True), "cuda")
    words = args["tree_mask"].clone()
    args["tree_mask"].fill_(-1)
    args["seq_lens"].fill_(queries)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = paged_attention(**args)
    for lengths in ((900, 200), (queries, 0), (500, queries + 1)):
        args["seq_lens"].copy_(torch.tensor(lengths))
        args["tree_mask"].copy_(words)
        graph.replay()
        assert_same_bits(results, paged_attention(**args))
        assert_right(results, args)


def test_caches_that_hold_codes_have_trees_too(device: str) -> None:
    """The bits that a mask hides are never decoded into a sum: they may be any code."""
    for kv_dtype in QUANTIZED_KV:
        case = PagedAttentionCase(((12, 60),), 8, 2, 64, 1, kv_dtype=kv_dtype, tree=True)
        args = named(case, device)
        out, _ = paged_attention(**args)
        node = 11
        word = args["tree_mask"][node].item()
        aside = [i for i in range(node) if not word >> i & 1]
        pages = args["page_table"][0, [48 + i for i in aside]].long()
        for name in ("k_cache", "v_cache"):
            bits = as_bits(args[name]).clone()
            bits[pages] = 0x7 if kv_dtype != "int4" else 0xF7
            args[name] = bits.view(args[name].dtype)
        other, _ = paged_attention(**args)
        if device == "cpu":
            assert_equal(other[node], out[node], name=kv_dtype)
        torch.testing.assert_close(other[node], out[node], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kv_dtype", [None, "e4m3", "int4"])
@pytest.mark.parametrize("ahead", [0, 3, 61, 509])
def test_a_node_has_the_bits_of_its_branch_on_the_cpu(ahead: int, kv_dtype: str | None) -> None:
    """Across tiles and splits of keys, in the dtype whose weights are rounded: a greedy text must
    not turn at a tie."""
    random = Random(ahead)
    parents = [-1, *(random.randrange(max(0, node - 20), node) for node in range(1, 64))]
    keys = ((64, ahead + 64),)
    for options in ({}, {"window": 30, "sink_tokens": 5}, {"alibi": True}):
        case = PagedAttentionCase(keys, 8, 2, 64, 1, torch.bfloat16, kv_dtype=kv_dtype, **options)
        args = named(case, "cpu") | {"tree_mask": words_of(parents)}
        out, lse = paged_attention(**args)
        for node in (0, 1, 20, 40, 62, 63):
            last = branch_of(args, node)
            alone = last | {
                "q": last["q"][-1:],
                "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32),
                "max_seqlen_q": 1,
            }
            found = (out[node : node + 1], lse[node : node + 1])
            assert_same_bits(paged_attention(**alone), found)

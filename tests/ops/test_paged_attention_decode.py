"""How decode attention shares its keys out to CTAs and merges their parts.

Whatever the lengths, graphs and streams: values are as if one CTA had done it all, and the bits of
a call never change.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from effllm.ops import paged_attention
from effllm.ops._kv_codes import QUANTIZED_KV
from effllm.ops.paged_attention import paged_attention_ref
from effllm.testing.cases.paged_attention import PagedAttentionCase
from effllm.testing.compare import assert_close_to_reference, assert_equal
from effllm.testing.run import bind, check_values, schema_of

Results = tuple[Tensor, Tensor]

SPLIT = PagedAttentionCase(((1, 3000), (1, 900)), 8, 2, 128, 16)
"""Parts of both sequences go to many CTAs."""


def named(case: PagedAttentionCase, device: str, seed: int = 0) -> dict[str, Any]:
    return bind(schema_of("paged_attention"), *case.make(device, seed))


def assert_right(results: Results, args: dict[str, Any]) -> None:
    """Against float64, by the tolerance law."""
    dtype = args["q"].dtype
    exact = paged_attention_ref(**args)
    out, lse = paged_attention_ref(**args, dtype=torch.float32, weights_dtype=dtype)
    for actual, wanted, baseline in zip(results, exact, (out.to(dtype), lse), strict=True):
        assert_close_to_reference(actual, wanted, baseline)


def assert_same_bits(results: Results, expected: Results) -> None:
    for actual, wanted in zip(results, expected, strict=True):
        assert_equal(actual, wanted)


def capture(args: dict[str, Any]) -> tuple[torch.cuda.CUDAGraph, Results]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = paged_attention(**args)
    return graph, results


def lengths_case(*lengths: int, **options: Any) -> PagedAttentionCase:
    return PagedAttentionCase(tuple((1, keys) for keys in lengths), **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(lengths_case(65536, *range(1, 64), num_q_heads=4, num_kv_heads=1), id="one"),
        pytest.param(
            lengths_case(*range(0, 6000, 197), num_q_heads=8, num_kv_heads=2), id="ragged"
        ),
        pytest.param(lengths_case(0, 0, 700, 0, 5, *[0] * 70, 2000, 0), id="empty_between"),
        pytest.param(lengths_case(*[0] * 40), id="all_empty"),
        # As many pairs (sequence, KV head) as an H100 has multiprocessors, and one more or less.
        *(pytest.param(lengths_case(*[200] * n, head_dim=128), id=f"b{n}") for n in (65, 66, 67)),
        # Far more pairs than CTAs: each has several whole ones, and parts of two.
        pytest.param(lengths_case(*[130, 1, 257, 64] * 40, head_dim=128, page_size=1), id="b160"),
        pytest.param(lengths_case(*range(200, 0, -2), head_dim=256), id="b100_d256"),
        # One length on both sides of what a CTA's block, part, and all CTAs together have.
        *(
            pytest.param(lengths_case(n, num_kv_heads=1, head_dim=128), id=f"s{n}")
            for n in (63, 65, 127, 128, 129, 255, 257, 16895, 16897, 33793)
        ),
        # Row tiles of one length see different keys; windows begin anywhere.
        pytest.param(PagedAttentionCase(((7, 1500), (2, 90), (0, 50), (5, 3))), id="row_tiles"),
        pytest.param(lengths_case(5000, 100, 2, 1033, window=1000, head_dim=128), id="window"),
        pytest.param(PagedAttentionCase(((6, 4000), (1, 800)), window=129), id="short_window"),
    ],
)
def test_lengths(case: PagedAttentionCase) -> None:
    check_values(paged_attention, case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("captured_at", [17, 3000])
def test_a_graph_is_shared_out_by_the_lengths_of_its_replay(captured_at: int) -> None:
    args = named(SPLIT, "cuda")
    args["seq_lens"].fill_(captured_at)
    args["seq_lens"].clamp_(max=900)
    graph, results = capture(args)
    for lengths in ((400, 400), (1, 1), (3000, 900), (0, 17), (17, 17), (0, 0), (2999, 1)):
        args["seq_lens"].copy_(torch.tensor(lengths))
        graph.replay()
        assert_right(results, args)
        assert_same_bits(results, paged_attention(**args))


FIRST_CALL = """
import torch
from effllm.ops import paged_attention
torch.manual_seed(0)
like = dict(dtype=torch.bfloat16, device="cuda")
q, k, v = torch.randn(1, 8, 128, **like), *torch.randn(2, 4000, 1, 2, 128, **like)
table = torch.randperm(4000, device="cuda").to(torch.int32)[None]
lens = torch.tensor([4000], dtype=torch.int32, device="cuda")
starts = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    results = paged_attention(q, k, v, table, lens, starts, max_seqlen_q=1)
for _ in range(3):
    graph.replay()
for actual, wanted in zip(results, paged_attention(q, k, v, table, lens, starts, max_seqlen_q=1)):
    assert torch.equal(actual, wanted) and not actual.isnan().any()
"""


@pytest.mark.gpu
def test_the_first_call_of_a_process_can_be_captured() -> None:
    """Nothing is set up before: no counters are cleared, no memory is held."""
    run = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED_KV])
def test_a_hundred_runs_give_the_same_bits(kv_dtype: str | None) -> None:
    """Whichever CTA comes last merges, and always in the same order."""
    case = lengths_case(3000, 900, 0, 1, 2222, num_q_heads=8, head_dim=128, kv_dtype=kv_dtype)
    args = named(case, "cuda")
    expected = paged_attention(**args)
    runs = [paged_attention(**args) for _ in range(100)]
    for results in runs:
        assert_same_bits(results, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["nan", "ones", "small"])
def test_memory_of_parts_may_hold_anything(pattern: str) -> None:
    """What the allocator hands out next is filled beforehand."""
    args = named(SPLIT, "cuda")
    expected = paged_attention(**args)
    for _ in range(3):
        fill = torch.empty(2**22, dtype=torch.float32, device="cuda")
        if pattern == "nan":
            fill.fill_(float("nan"))
        else:
            fill.view(torch.int32).fill_(-1 if pattern == "ones" else 1)
        del fill
        assert_same_bits(paged_attention(**args), expected)


@pytest.mark.gpu
def test_streams_do_not_meet() -> None:
    """Two at once, whose CTAs share the GPU, and graphs of one capture stream replayed on both."""
    all_args = [named(SPLIT, "cuda", seed) for seed in range(2)]
    all_args[1]["seq_lens"].copy_(torch.tensor([1700, 33]))
    expected = [paged_attention(**args) for args in all_args]
    graphs = [capture(args) for args in all_args]
    streams = [torch.cuda.Stream() for _ in all_args]
    torch.cuda.synchronize()
    eager: list[list[Results]] = [[], []]
    for _ in range(50):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                eager[index].append(paged_attention(**all_args[index]))
                graphs[index][0].replay()
    torch.cuda.synchronize()
    for index, wanted in enumerate(expected):
        assert_same_bits(graphs[index][1], wanted)
        for results in eager[index]:
            assert_same_bits(results, wanted)


@pytest.mark.gpu
def test_a_call_waits_for_the_one_that_writes_its_inputs() -> None:
    """It may start before that has finished: lengths, queries and keys are still the new ones."""
    args = named(SPLIT, "cuda")
    other = args | {
        "q": args["q"].flip(0),
        "k_cache": -args["k_cache"],
        "v_cache": 2 * args["v_cache"],
        "seq_lens": args["seq_lens"] - 7,
    }
    expected = [paged_attention(**args), paged_attention(**other)]
    live = {name: args[name].clone() for name in ("q", "k_cache", "v_cache", "seq_lens")}
    short = torch.ones_like(args["seq_lens"])
    results = []
    for round_idx in range(20):
        source = (args, other)[round_idx % 2]
        live["seq_lens"].copy_(short)
        results.append(paged_attention(**args | live))  # decode attention is the kernel ahead, too
        for name in ("q", "k_cache", "v_cache", "seq_lens"):
            live[name].copy_(source[name])
        results.append(paged_attention(**args | live))
    for round_idx in range(20):
        assert_same_bits(results[2 * round_idx + 1], expected[round_idx % 2])


@pytest.mark.gpu
def test_a_chain_of_calls_reads_what_the_call_before_wrote() -> None:
    """Each output is the next call's query."""
    args = named(SPLIT, "cuda")
    serial = args["q"]
    for _ in range(30):
        serial = paged_attention(**args | {"q": serial})[0]
        torch.cuda.synchronize()
    chained = args["q"]
    for _ in range(30):
        chained = paged_attention(**args | {"q": chained})[0]
    assert_equal(chained, serial)


def call_that_gives(words: Tensor, num_keys: int, device: str = "cuda") -> dict[str, Any]:
    """Arguments of a call whose result is ``words`` [2, D / 2] int32, bit for bit.

    A KV head's words are the value of key 0. Its weight is 1, that of the other keys is 0.
    """
    dim, pages = 2 * words.shape[1], -(-num_keys // 16)
    k, v = torch.zeros(2, pages, 16, 2, dim, dtype=torch.float16, device=device)
    k[0, 0] = 8.0
    v[0, 0] = words.view(torch.float16)
    ints = {"dtype": torch.int32, "device": device}
    return {
        "q": torch.full((1, 2, dim), 8.0, dtype=torch.float16, device=device),
        "k_cache": k,
        "v_cache": v,
        "page_table": torch.arange(pages, **ints)[None],
        "seq_lens": torch.tensor([num_keys], **ints),
        "cu_seqlens_q": torch.tensor([0, 1], **ints),
        "max_seqlen_q": 1,
        "scale": 1.0,
    }


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED_KV])
@pytest.mark.parametrize("num_keys_ahead", [700, 30000])
def test_lengths_and_pages_that_the_call_ahead_writes(
    num_keys_ahead: int, kv_dtype: str | None
) -> None:
    """A call may start before the one ahead has finished, but must not go by what it finds then.

    The one ahead writes in its last moment, over what it wrote in the replay before: lengths within
    a block of 64 keys, past it, or none, and another table. Or all stays as it was.
    """
    case = lengths_case(*[1024] * 4, head_dim=128, kv_dtype=kv_dtype)
    args = named(case, "cuda")
    pages = args["page_table"][:, :64].flatten().cpu()  # without what lies past the end
    words = []
    for keys, seed in (
        (1000, 0),
        (1001, 0),
        (1024, 0),
        (1024, 1),
        (65, 1),
        (3, 1),
        (0, 2),
        (960, 3),
    ):
        lengths = torch.tensor([keys, min(keys, 200), keys // 64 * 64, 0], dtype=torch.int32)
        order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(seed))
        words.append(torch.stack([lengths.repeat(16), pages[order[:64]]]).cuda())
    ahead = call_that_gives(words[0], num_keys_ahead)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = paged_attention(**ahead)[0].view(torch.int32)[0]
        changing = {"seq_lens": written[0, :4], "page_table": written[1].expand(4, -1)}
        results = paged_attention(**args | changing)
    for wanted in (*words, words[-1], *reversed(words)):
        ahead["v_cache"][0, 0] = wanted.view(torch.float16)
        graph.replay()
        assert_equal(written, wanted)
        fixed = {name: value.clone() for name, value in changing.items()}
        assert_same_bits(results, paged_attention(**args | fixed))
        assert_right(results, args | fixed)

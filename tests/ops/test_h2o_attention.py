"""h2o_attention beyond the cases of the contract: what its scores are, and that results stay."""

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

from effllm.ops import h2o_attention, paged_attention
from effllm.ops._kv_codes import QUANTIZED_KV
from effllm.ops.h2o_attention import h2o_attention_ref
from effllm.testing import hostile
from effllm.testing.cases.h2o_attention import CASES, CPU_CASES, LONG, MIXED, H2oAttentionCase
from effllm.testing.compare import assert_close_to_reference, assert_equal
from effllm.testing.run import bind, check_values, schema_of

CASE = H2oAttentionCase((20, 9), 4, 2, 64, 4, torch.float16)


def named(case: H2oAttentionCase, device: str) -> dict[str, Any]:
    return bind(schema_of("h2o_attention"), *case.make(device))


def call(args: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, of a copy of those given, out and lse."""
    scores = args["scores"].clone()
    return scores, *h2o_attention(**args | {"scores": scores})


def dense(batch: int, keys: int, heads: int, kv_heads: int, dim: int, device: str) -> Any:
    """q, and keys and values as [B, HKV, S, D], in fp16."""
    shapes = ((batch, heads, dim), *((batch, kv_heads, keys, dim),) * 2)
    return [
        hostile.normal(*shape, dtype=torch.float16, device=device, seed=seed)
        for seed, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.id)
def test_fp32_on_the_cpu(case: H2oAttentionCase) -> None:
    check_values(h2o_attention, case, "cpu")


@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        H2oAttentionCase,
        st.lists(st.integers(0, 150), max_size=4).map(tuple),
        num_q_heads=st.sampled_from([6, 12]),
        num_kv_heads=st.sampled_from([1, 2, 3, 6]),
        head_dim=st.integers(1, 12).map(lambda eighths: 8 * eighths),
        page_size=st.integers(1, 70),
        dtype=st.sampled_from([torch.float16, torch.bfloat16]),
        softcap=st.sampled_from([0.0, 2.0]),
        sinks=st.booleans(),
        per_head=st.booleans(),
    ),
    seed=st.integers(0, 5),
)
def test_any_problem(case: H2oAttentionCase, seed: int) -> None:
    args, kwargs = case.make("cpu", seed)
    reference, baseline = case.reference(*args, **kwargs), case.baseline(*args, **kwargs)
    results = (args[3], *h2o_attention(*args, **kwargs))
    for actual, exact, plain in zip(results, reference, baseline, strict=True):
        assert_close_to_reference(actual, exact, plain)


@pytest.mark.parametrize("group", [1, 4, 8])
def test_scores_are_column_sums_of_the_dense_matrix(group: int, device: str) -> None:
    """With keys repeated for their query heads; a page for each sequence and head."""
    batch, keys, kv_heads, dim = 3, 90, 2, 64
    q, k, v = dense(batch, keys, group * kv_heads, kv_heads, dim, device)
    pages = torch.arange(batch * kv_heads, dtype=torch.int32, device=device).view(
        batch, kv_heads, 1
    )
    caches = []
    for rows in (k, v):  # what other heads have in a page is NaN
        cache = hostile.poison_(torch.empty(batch * kv_heads, keys, kv_heads, dim).to(rows))
        for head in range(kv_heads):
            cache[pages[:, head, 0].long(), :, head] = rows[:, head]
        caches.append(cache)
    scores = torch.zeros(batch, kv_heads, keys, device=device)
    seq_lens = torch.full((batch, kv_heads), keys, dtype=torch.int32, device=device)
    out, _ = h2o_attention(q, *caches, scores, pages, seq_lens)

    k, v = (rows.double().repeat_interleave(group, dim=1) for rows in (k, v))
    weights = (torch.einsum("bhd,bhkd->bhk", q.double(), k) / dim**0.5).softmax(-1)
    expected = weights.view(batch, kv_heads, group, keys).sum(2)
    torch.testing.assert_close(scores.double(), expected, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(
        out.double(), torch.einsum("bhk,bhkd->bhd", weights, v), rtol=4e-3, atol=4e-3
    )


@pytest.mark.parametrize("case", [*CASES, *CPU_CASES], ids=lambda case: case.id)
def test_results_are_those_of_paged_attention_on_the_cpu(case: H2oAttentionCase) -> None:
    """To the bit."""
    args = named(case, "cpu")
    _, out, lse = call(args)
    starts = torch.arange(len(args["q"]) + 1, dtype=torch.int32)
    del args["scores"]
    expected = paged_attention(**args, cu_seqlens_q=starts, max_seqlen_q=1)
    assert_equal(out, expected[0])
    assert_equal(lse, expected[1])


def test_each_query_head_gives_one_in_all(device: str) -> None:
    """Less what its sink takes; and nothing where there is no key."""
    args = named(H2oAttentionCase(LONG, 8, 2, 128, 16, sinks=True), device)
    args["scores"].zero_()
    scores, _, lse = call(args)
    given = torch.sigmoid(lse.double() - args["sinks"].double()).where(lse.isfinite(), 0.0)
    expected = given.view(*scores.shape[:2], 4).sum(2)
    torch.testing.assert_close(scores.double().sum(-1), expected, rtol=1e-5, atol=1e-6)
    used = torch.arange(scores.shape[2], device=device) < args["seq_lens"][..., None]
    assert (scores[~used] == 0).all()


def test_steps_add_up(device: str) -> None:
    args = named(CASE, device)
    first, *_ = call(args)
    once = first - args["scores"]
    for _ in range(3):
        h2o_attention(**args)
    torch.testing.assert_close(args["scores"] - once * 2, first, equal_nan=True)


def test_sequences_are_apart_on_the_cpu() -> None:
    """What one adds does not depend on the batch around it."""
    args = named(H2oAttentionCase(MIXED, 6, 3, 64, 16), "cpu")
    together = call(args)
    for index in range(len(MIXED)):
        rows = ("q", "scores", "page_table", "seq_lens")
        alone = args | {name: args[name][index : index + 1] for name in rows}
        for actual, wanted in zip(call(alone), together, strict=True):
            assert_equal(actual, wanted[index : index + 1])


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_the_number_of_threads_does_not_matter_on_the_cpu(kv_dtype: str | None) -> None:
    args = named(H2oAttentionCase(LONG, 8, 2, 64, 16, kv_dtype=kv_dtype), "cpu")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(call(args))
    finally:
        torch.set_num_threads(before)
    for actual, wanted in zip(*results, strict=True):
        assert_equal(actual, wanted)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_any_strides_of_scores(order: tuple[int, ...], device: str) -> None:
    args = named(CASE, device)
    expected, *_ = call(args)
    padded = torch.nn.functional.pad(args["scores"].permute(order), (1, 2))[..., 1:-2]
    scores = padded.permute(order)
    h2o_attention(**args | {"scores": scores})
    assert_equal(scores, expected)


@pytest.mark.sanitizer
def test_nothing_is_written_beside_the_scores(device: str) -> None:
    args = named(H2oAttentionCase((20, 64), 4, 2, 64, 4), device)
    # No slot more than the longest sequence has keys.
    args["scores"], check = hostile.guarded(args["scores"][..., :64].nan_to_num())
    h2o_attention(**args)
    check()


def test_caches_beyond_32_bit_offsets(device: str) -> None:
    """Two pages that lie 2^31 elements apart."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    k_cache, v_cache = (
        memory.as_strided((2, 1, 1, 32), (2**31, 32, 32, 1), offset) for offset in (0, 32)
    )
    k_cache[1], v_cache[1] = 1.0, 7.0
    q = torch.ones(1, 2, 32, dtype=torch.bfloat16, device=device)
    ones = torch.ones(1, 1, dtype=torch.int32, device=device)
    scores = torch.zeros(1, 1, 1, device=device)
    out, _ = h2o_attention(q, k_cache, v_cache, scores, ones[None], ones)
    assert (out == 7).all()
    assert scores.item() == pytest.approx(2.0, rel=1e-6)


def test_scores_beyond_32_bit_offsets(device: str) -> None:
    """Those of two sequences that lie 2^31 elements apart."""
    memory = torch.empty(2**31 + 64, dtype=torch.float32, device=device)
    scores = memory.as_strided((2, 2, 20), (2**31, 32, 1), 0)
    scores.zero_()
    args = named(CASE, device)
    expected, *_ = call(args | {"scores": torch.zeros(2, 2, 20, device=device)})
    h2o_attention(**args | {"scores": scores})
    assert_equal(scores.contiguous(), expected)


def test_a_key_that_is_nan_makes_its_head_nan_and_no_other(device: str) -> None:
    args = named(CASE, device)
    args["k_cache"][args["page_table"][0, 1, 0].long(), 0, 1] = float("nan")
    expected, *_ = call(named(CASE, device))
    scores, *_ = call(args)
    used = args["seq_lens"][0, 1]
    assert scores[0, 1, :used].isnan().all()
    scores[0, 1], expected[0, 1] = 0.0, 0.0
    assert_equal(scores, expected)


def test_keys_of_no_weight_and_all_weight(device: str) -> None:
    """Scores of -inf, of which there may be nothing else, add 0; a score far above all others 1."""
    k_cache = torch.zeros(1, 3, 1, 8, dtype=torch.float16, device=device)
    v_cache = torch.ones_like(k_cache)
    page = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
    seq_lens = torch.full((1, 1), 3, dtype=torch.int32, device=device)
    q = torch.nn.functional.pad(torch.ones(1, 1, 1, device=device), (0, 7)).half()
    inf = float("inf")
    for keys, expected in (([-inf, -inf, -inf], [0, 0, 0]), ([-inf, 5000.0, -6e4], [0, 1, 0])):
        k_cache[0, :, 0, 0] = torch.tensor(keys, device=device)
        scores = torch.zeros(1, 1, 3, device=device)
        h2o_attention(q, k_cache, v_cache, scores, page, seq_lens, scale=1.0)
        assert scores.flatten().tolist() == expected


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_lengths() -> None:
    """Captured as the first call, at 37 keys; replayed with others."""
    args = named(H2oAttentionCase((900, 900), 8, 2, 128, 16, per_head=False), "cuda")
    args["seq_lens"].fill_(37)
    args["scores"].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = h2o_attention(**args)
    for seq_lens in ((37, 37), (900, 1), (0, 400)):
        args["seq_lens"].copy_(torch.tensor(seq_lens))
        args["scores"].zero_()
        exact = h2o_attention_ref(**args)
        graph.replay()
        torch.testing.assert_close(args["scores"].double(), exact[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(results[0].double(), exact[1], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LONG * 3, (9000,), (2000,) * 64])
def test_the_same_bits_each_time(lengths: tuple[int, ...]) -> None:
    args = named(H2oAttentionCase(lengths, 32, 8, 128, 16), "cuda")
    expected = call(args)
    for _ in range(50):
        for actual, wanted in zip(call(args), expected, strict=True):
            assert_equal(actual, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_the_same_bits_beside_other_work(kv_dtype: str | None) -> None:
    """CTAs that wait for others of their pair give up while those have no multiprocessor."""
    args = named(H2oAttentionCase((20000,), 8, 2, 128, 16, kv_dtype=kv_dtype), "cuda")
    expected = call(args)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for stream in streams * 10:
        with torch.cuda.stream(stream):
            results.append(call(args))
    torch.cuda.synchronize()
    for result in results:
        for actual, wanted in zip(result, expected, strict=True):
            assert_equal(actual, wanted)


@pytest.mark.gpu
@pytest.mark.sanitizer
def test_lengths_out_of_range_are_clamped_on_the_gpu() -> None:
    """More keys than scores have slots, or the table pages: the first ones are scored."""
    args = named(H2oAttentionCase((60, 60), 4, 2, 64, 4, per_head=False), "cuda")
    expected, *_ = call(args)
    short, check = hostile.guarded(args["scores"][..., :40])
    h2o_attention(**args | {"scores": short})
    check()
    assert_equal(short, expected[..., :40])
    args["page_table"] = args["page_table"][:, :15]
    wild = torch.tensor([2**31 - 1, -5], dtype=torch.int32, device="cuda")
    scores, *_ = call(args | {"seq_lens": wild})
    assert_equal(scores[0], expected[0])
    assert_equal(scores[1], args["scores"][1])


def wrong(**changes: Any) -> dict[str, Any]:
    return named(CASE, "cpu") | changes


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


HALF = torch.float16
ERRORS = [
    (wrong(q=torch.ones(2, 4, 64, dtype=torch.float64)), "q must be float16.*, got another dtype"),
    (wrong(q=torch.ones(2, 256, dtype=HALF)), r"q must be \[B, HQ, D\] = .*, got \[2, 256\]"),
    (
        wrong(q=torch.ones(3, 4, 64, dtype=HALF)),
        r"page_table must be \[B, HKV, MAXP\] = \[3, 2, \?\], got \[2, 2, 7\]",
    ),
    (
        wrong(q=torch.ones(2, 5, 64, dtype=HALF)),
        "q must have a number of heads that is a multiple of the cache's 2, got 5",
    ),
    (wrong(scores=torch.ones(2, 2, 20, dtype=HALF)), "scores must be float32, got float16"),
    (
        wrong(scores=torch.ones(2, 4, 20)),
        r"scores must be \[B, HKV, S\] = \[2, 2, \?\], got \[2, 4, 20\]",
    ),
    (wrong(scores=torch.ones(2, 20, 2).mT), "scores must have stride 1 in its last dimension"),
    (
        wrong(seq_lens=int32(20, 9)),
        r"seq_lens must be \[B, HKV\] = \[2, 2\], got \[2\]",
    ),
    (wrong(sinks=torch.ones(3)), r"sinks must be \[HQ\] = \[4\], got \[3\]"),
    (wrong(k_scale=torch.ones(1, 1, 1)), "k_scale must be None for a cache of float16"),
    (wrong(scale=float("inf")), "scale must be finite, got inf"),
    (wrong(softcap=-1.0), "softcap must be finite and at least 0"),
]
CPU_ERRORS = [
    (
        wrong(scores=torch.ones(2, 2, 19)),
        r"scores must have a slot for each key of seq_lens\[0, 0\] = 20, got S = 19",
    ),
    (
        wrong(seq_lens=int32(20, 9, 9, -1).view(2, 2)),
        r"seq_lens\[1, 1\] must be in \[0, MAXP \* P\] = \[0, 28\], got -1",
    ),
    (
        wrong(page_table=torch.full((2, 2, 7), 99, dtype=torch.int32)),
        r"page_table\[0, 0, 0\] must be in \[0, NP - 1\] = .*, got 99",
    ),
]


@pytest.mark.parametrize(("args", "message"), ERRORS + CPU_ERRORS)
def test_errors(args: dict[str, Any], message: str) -> None:
    before = args["scores"].clone()
    with pytest.raises(RuntimeError, match=f"effllm::h2o_attention: {message}"):
        h2o_attention(**args)
    assert_equal(args["scores"], before)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k_cache", "scores", "page_table", "seq_lens"])
def test_mixed_devices_are_a_named_error(name: str) -> None:
    args = {key: value.cuda() for key, value in wrong().items() if isinstance(value, Tensor)}
    args[name] = args[name].cpu()
    with pytest.raises(RuntimeError, match=rf"{name} must be on cuda:0 as q is, got cpu"):
        h2o_attention(**args)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = compiled("h2o_attention.cpp", tmp_path_factory.mktemp("h2o_attention"))
    library.h2o_attention_on_warps.restype = ctypes.c_bool
    return library


def kernels_of(
    library: ctypes.CDLL, num_sms: int, capability: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """h2o_attention as the decode kernels of a GPU of so many multiprocessors do it: their own
    headers, on warps whose lanes take turns."""

    def call(
        *args: Tensor,
        sinks: Tensor | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        q = args[0]
        out = hostile.poison_(torch.empty(q.shape, dtype=q.dtype))
        lse = hostile.poison_(torch.empty(q.shape[:2]))
        tensors = [*args, *(None,) * (8 - len(args)), sinks, out, lse]
        assert library.h2o_attention_on_warps(
            (TensorArgument * 11)(*map(as_argument, tensors)),
            ctypes.c_double(q.shape[-1] ** -0.5 if scale is None else scale),
            ctypes.c_double(softcap),
            num_sms,
            capability,
        )
        return out, lse

    return call


def is_played(case: H2oAttentionCase) -> bool:
    """Whether it is of the dtype that is compiled here, and one of quantised caches of a head dim
    that decode kernels with scores are for; lanes that take turns are done with it in seconds."""
    small = sum(case.lengths) * case.num_q_heads * case.head_dim <= 2**23
    fits = case.kv_dtype is None or case.head_dim == 128
    return case.dtype == torch.bfloat16 and fits and sum(case.lengths) > 0 and small


@pytest.mark.parametrize(("num_sms", "capability"), [(1, 8), (5, 9)])
@pytest.mark.parametrize("case", [c for c in CASES if is_played(c)], ids=lambda case: case.id)
def test_the_kernels(
    case: H2oAttentionCase, num_sms: int, capability: int, library: ctypes.CDLL
) -> None:
    check_values(kernels_of(library, num_sms, capability), case, "cpu")


@pytest.mark.parametrize(
    ("group", "kv_dtype"),
    [
        *((group, name) for group in (1, 2, 3, 5, 7, 8) for name in (None, *QUANTIZED_KV)),
        # More than a row tile takes: attention, and then the sums by key.
        (9, None),
        (20, None),
    ],
)
def test_the_kernels_with_any_group(group: int, kv_dtype: str | None, library: ctypes.CDLL) -> None:
    case = H2oAttentionCase((300, 0, 33), 2 * group, 2, 128, 16, kv_dtype=kv_dtype, sinks=True)
    check_values(kernels_of(library, 3, 9), case, "cpu")


def test_the_kernels_score_no_more_slots_than_there_are(library: ctypes.CDLL) -> None:
    """Of lengths beyond them, and beyond the table."""
    kernels = kernels_of(library, 2, 9)
    args, kwargs = H2oAttentionCase((60, 60), 4, 2, 64, 4, per_head=False).make("cpu")
    q, k_cache, v_cache, scores, table, _ = args
    wild = torch.tensor([2**31 - 1, -5], dtype=torch.int32)
    for slots in (63, 40):
        expected = scores.clone()
        kernels(q, k_cache, v_cache, expected, *args[4:], **kwargs)
        some, check = hostile.guarded(scores[..., :slots])
        kernels(q, k_cache, v_cache, some, table[:, :15], wild, **kwargs)
        check()
        assert_equal(some[0], expected[0, :, :slots])
        assert_equal(some[1], scores[1, :, :slots])

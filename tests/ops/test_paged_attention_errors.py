"""What paged_attention refuses, and how it says so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effllm.ops import paged_attention
from effllm.testing import hostile
from effllm.testing.cases.paged_attention import PagedAttentionCase
from effllm.testing.run import bind, schema_of

CASE = PagedAttentionCase(((3, 20), (1, 9)), 4, 2, 64, 4, torch.float16)


def arguments(device: str) -> dict[str, Any]:
    return bind(schema_of("paged_attention"), *CASE.make(device))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def wrong(**changes: Any) -> dict[str, Any]:
    return arguments("cpu") | changes


HALF = torch.float16
CACHE = (10, 4, 2, 64)
ERRORS = [
    (wrong(q=torch.ones(4, 4, 64, dtype=torch.float64)), "q must be float16.*, got another dtype"),
    (wrong(q=torch.ones(4, 256, dtype=HALF)), r"q must be \[T, HQ, D\] = .*, got \[4, 256\]"),
    (wrong(q=torch.ones(4, 64, 4, dtype=HALF).mT), "q must have stride 1 in its last dimension"),
    (
        wrong(q=torch.ones(4, 5, 64, dtype=HALF)),
        "q must have a number of heads that is a multiple of the cache's 2, got 5",
    ),
    (
        wrong(
            q=torch.ones(4, 4, 60, dtype=HALF),
            k_cache=torch.ones(10, 4, 2, 60, dtype=HALF),
            v_cache=torch.ones(10, 4, 2, 60, dtype=HALF),
        ),
        "q must have a head dim that is a multiple of 8 up to 256, got 60",
    ),
    (
        wrong(
            q=torch.ones(4, 4, 264, dtype=HALF),
            k_cache=torch.ones(10, 4, 2, 264, dtype=HALF),
            v_cache=torch.ones(10, 4, 2, 264, dtype=HALF),
        ),
        "q must have a head dim that is a multiple of 8 up to 256, got 264",
    ),
    (
        wrong(k_cache=torch.ones(CACHE)),
        "k_cache must be float16, float8_e4m3fn, int8 or uint8, got float32",
    ),
    (
        wrong(k_cache=torch.ones(10, 4, 2, 32, dtype=HALF)),
        r"k_cache must be \[NP, P, HKV, D\] = \[10, 4, 2, 64\], got \[10, 4, 2, 32\]",
    ),
    (
        wrong(k_cache=torch.ones(40, 2, 64, dtype=HALF)),
        r"k_cache must be \[NP, P, HKV, D\] = .*, got \[40, 2, 64\]",
    ),
    (
        wrong(k_cache=torch.ones(10, 4, 64, 2, dtype=HALF).mT),
        "k_cache must have stride 1 in its last dimension",
    ),
    (wrong(v_cache=torch.ones(CACHE)), "v_cache must be float16, got float32"),
    (
        wrong(v_cache=torch.ones(99, 4, 2, 64, dtype=HALF)),
        r"v_cache must be \[NP, P, HKV, D\] = \[\d+, 4, 2, 64\], got \[99, 4, 2, 64\]",
    ),
    (
        wrong(v_cache=wrong()["v_cache"].mT.contiguous().mT),
        "v_cache must have stride 1 in its last dimension",
    ),
    (
        wrong(
            k_cache=torch.ones(10, 0, 2, 64, dtype=HALF),
            v_cache=torch.ones(10, 0, 2, 64, dtype=HALF),
        ),
        "k_cache must have a page size of at least 1, got 0",
    ),
    (wrong(page_table=wrong()["page_table"].long()), "page_table must be int32, got int64"),
    (wrong(page_table=int32(1, 2)), r"page_table must be \[B, MAXP\] = .*, got \[2\]"),
    (
        wrong(page_table=wrong()["page_table"].T.contiguous().T),
        "page_table must have stride 1 in its last dimension",
    ),
    (wrong(seq_lens=torch.tensor([20, 9])), "seq_lens must be int32, got int64"),
    (wrong(seq_lens=int32(20)), r"seq_lens must be \[B\] = \[2\], got \[1\]"),
    (wrong(seq_lens=int32(20, 0, 9, 0)[::2]), "seq_lens must have stride 1"),
    (wrong(cu_seqlens_q=torch.tensor([0, 3, 4])), "cu_seqlens_q must be int32, got int64"),
    (wrong(cu_seqlens_q=int32(0, 4)), r"cu_seqlens_q must be \[B \+ 1\] = \[3\], got \[2\]"),
    (wrong(cu_seqlens_q=int32(0, 0, 3, 0, 4, 0)[::2]), "cu_seqlens_q must have stride 1"),
    (
        wrong(page_table=torch.zeros(2, 3, 7, dtype=torch.int32)),
        r"page_table must be \[B, HKV, MAXP\] = \[2, 2, \?\], got \[2, 3, 7\]",
    ),
    (
        wrong(page_table=torch.zeros(2, 2, 7, dtype=torch.int32)),
        r"seq_lens must be \[B, HKV\] = \[2, 2\], got \[2\]",
    ),
    (
        wrong(seq_lens=torch.zeros(2, 2, dtype=torch.int32)),
        r"seq_lens must be \[B\] = \[2\], got \[2, 2\]",
    ),
    (
        wrong(
            page_table=torch.zeros(2, 2, 7, dtype=torch.int32),
            seq_lens=torch.zeros(2, 2, dtype=torch.int32).T,
        ),
        "seq_lens must have stride 1 in its last dimension",
    ),
    (
        wrong(page_table=torch.zeros(1, 2, 2, 7, dtype=torch.int32)),
        r"page_table must be \[B, MAXP\] = .*, got \[1, 2, 2, 7\]",
    ),
    (wrong(sinks=torch.ones(3)), r"sinks must be \[HQ\] = \[4\], got \[3\]"),
    (wrong(sinks=torch.ones(4, dtype=HALF)), "sinks must be float32, got float16"),
    (wrong(sinks=torch.ones(8)[::2]), "sinks must have stride 1 in its last dimension"),
    (
        wrong(alibi_slopes=torch.ones(2, 4)),
        r"alibi_slopes must be \[HQ\] = \[4\], got \[2, 4\]",
    ),
    (wrong(alibi_slopes=torch.ones(4).double()), "alibi_slopes must be float32, got another"),
    (wrong(alibi_slopes=torch.ones(1).expand(4)), "alibi_slopes must have stride 1"),
    (
        wrong(tree_mask=torch.ones(3, dtype=torch.int64)),
        r"tree_mask must be \[T\] = \[4\], got \[3\]",
    ),
    (
        wrong(tree_mask=torch.ones(4, 1, dtype=torch.int64)),
        r"tree_mask must be \[T\] = .*, got \[4, 1\]",
    ),
    (wrong(tree_mask=int32(1, 3, 7, 1)), "tree_mask must be int64, got int32"),
    (
        wrong(tree_mask=torch.ones(8, dtype=torch.int64)[::2]),
        "tree_mask must have stride 1 in its last dimension",
    ),
    (
        wrong(tree_mask=torch.ones(4, dtype=torch.int64), causal=False),
        "causal must be true with a tree_mask, got false",
    ),
    (
        wrong(tree_mask=torch.ones(4, dtype=torch.int64), max_seqlen_q=65),
        "max_seqlen_q must be at most 64, the bits of a word, with a tree_mask, got 65",
    ),
    (wrong(max_seqlen_q=-1), "max_seqlen_q must be at least 0, got -1"),
    (wrong(window=0), "window must be at least 1 or None, got 0"),
    (wrong(split_size=0), "split_size must be a positive multiple of 64 or None, got 0"),
    (wrong(split_size=100), "split_size must be a positive multiple of 64 or None, got 100"),
    (wrong(split_size=-64), "split_size must be a positive multiple of 64 or None, got -64"),
    (wrong(sink_tokens=-1), "sink_tokens must be at least 0, got -1"),
    (wrong(softcap=-1.0), r"softcap must be finite and at least 0 \(0 = none\), got -1"),
    (wrong(softcap=math.nan), "softcap must be finite and at least 0"),
    (wrong(scale=math.inf), "scale must be finite, got inf"),
    (wrong(scale=1e300), "scale must be finite, got 1"),
]


def to_device(value: Any, device: str) -> Any:
    """Tensors with the strides that they have, which `.to` does not promise."""
    if device == "cpu" or not isinstance(value, Tensor):
        return value
    # All of the memory behind it: elements that share some cannot be written one by one.
    memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


@pytest.mark.parametrize(("args", "message"), ERRORS)
def test_errors(args: dict[str, Any], message: str, device: str) -> None:
    moved = {name: to_device(value, device) for name, value in args.items()}
    with pytest.raises(RuntimeError, match=f"effllm::paged_attention: {message}"):
        paged_attention(**moved)


VALUE_ERRORS = [
    ({"cu_seqlens_q": int32(1, 3, 4)}, r"cu_seqlens_q\[0\] must be 0, got 1"),
    (
        {"cu_seqlens_q": int32(0, 5, 4)},
        r"cu_seqlens_q\[1\] must be in \[the entry before it, T\] = \[0, 4\], got 5",
    ),
    (
        {"cu_seqlens_q": int32(0, 3, 2)},
        r"cu_seqlens_q\[2\] must be in \[the entry before it, T\] = \[3, 4\], got 2",
    ),
    ({"seq_lens": int32(20, 29)}, r"seq_lens\[1\] must be in \[0, MAXP \* P\] = \[0, 28\], got 29"),
    ({"seq_lens": int32(-1, 9)}, r"seq_lens\[0\] must be in \[0, MAXP \* P\] = \[0, 28\], got -1"),
    (
        {"max_seqlen_q": 2},
        "max_seqlen_q must be at least the longest query of cu_seqlens_q, 3, got 2",
    ),
    (
        {"max_seqlen_q": 2, "tree_mask": torch.ones(4, dtype=torch.int64)},
        "max_seqlen_q must be at least the longest query of cu_seqlens_q, 3, got 2",
    ),
    # An entry of the tail becomes one that is read.
    (
        {"seq_lens": int32(21, 9)},
        r"page_table\[0, 5\] must be in \[0, NP - 1\] = \[0, 10\], got -1",
    ),
    (
        {"seq_lens": int32(20, 17)},
        r"page_table\[1, 3\] must be in \[0, NP - 1\] = \[0, 10\], got -1",
    ),
]

HEAD_TABLES = torch.tensor([[[0, 1], [2, -1]], [[3, 11], [4, 5]]], dtype=torch.int32)
HEAD_LENS = torch.tensor([[8, 4], [4, 0]], dtype=torch.int32)
VALUE_ERRORS += [
    (
        {"page_table": HEAD_TABLES, "seq_lens": HEAD_LENS + int32(0, 1)},
        r"page_table\[0, 1, 1\] must be in \[0, NP - 1\] = \[0, 10\], got -1",
    ),
    (
        {"page_table": HEAD_TABLES, "seq_lens": HEAD_LENS + int32(1, 0)},
        r"seq_lens\[0, 0\] must be in \[0, MAXP \* P\] = \[0, 8\], got 9",
    ),
    (
        {"page_table": HEAD_TABLES, "seq_lens": HEAD_LENS - int32(0, 1)},
        r"seq_lens\[1, 1\] must be in \[0, MAXP \* P\] = \[0, 8\], got -1",
    ),
]


@pytest.mark.parametrize(("changes", "message"), VALUE_ERRORS)
def test_values_out_of_range_raise_on_the_cpu(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"effllm::paged_attention: {message}$"):
        paged_attention(**wrong(**changes))


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("changes", [changes for changes, _ in VALUE_ERRORS])
def test_values_out_of_range_are_clamped_on_the_gpu(changes: dict[str, Any]) -> None:
    moved = {name: to_device(value, "cuda") for name, value in wrong(**changes).items()}
    out, _ = paged_attention(**moved)
    torch.cuda.synchronize()
    assert out.shape == moved["q"].shape


@pytest.mark.gpu
def test_rows_of_a_cache_that_are_not_aligned_are_a_named_error_on_the_gpu() -> None:
    args = arguments("cuda")
    layouts = dict(hostile.odd_strides(args["v_cache"]))
    message = "effllm::paged_attention: v_cache must have rows that start at multiples of 16 bytes"
    with pytest.raises(RuntimeError, match=message):
        paged_attention(**args | {"v_cache": layouts["offset"]})


@pytest.mark.gpu
def test_fp32_on_the_gpu_is_a_named_error() -> None:
    args = arguments("cuda")
    for name in ("q", "k_cache", "v_cache"):
        args[name] = args[name].float()
    with pytest.raises(RuntimeError, match="q must be float16 or bfloat16, got float32"):
        paged_attention(**args)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    [
        "q",
        "k_cache",
        "v_cache",
        "page_table",
        "seq_lens",
        "cu_seqlens_q",
        "sinks",
        "alibi_slopes",
        "tree_mask",
    ],
)
def test_mixed_devices_are_a_named_error(name: str) -> None:
    heads = {name: torch.ones(4, device="cuda") for name in ("sinks", "alibi_slopes")}
    mask = torch.ones(4, dtype=torch.int64, device="cuda")
    args = arguments("cuda") | heads | {"tree_mask": mask}
    args[name] = args[name].cpu()
    with pytest.raises(RuntimeError, match=r"must be on (cpu|cuda:0) as q is, got (cpu|cuda:0)"):
        paged_attention(**args)

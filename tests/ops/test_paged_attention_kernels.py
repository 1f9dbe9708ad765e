"""paged_attention's kernels that split keys, proved without a GPU: their own headers, on warps
whose lanes take turns, against the reference."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from kernel_on_cpu import TensorArgument, as_argument, compiled
from torch import Tensor

from effllm.testing import hostile
from effllm.testing.cases.paged_attention import CASES, PagedAttentionCase
from effllm.testing.run import check_values

Kernels = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("paged_attention_kernels.cpp", tmp_path_factory.mktemp("paged_attention"))


def kernels_of(library: ctypes.CDLL, num_sms: int, capability: int) -> Kernels:
    """paged_attention as a GPU of so many multiprocessors does it."""

    def call(
        *args: Tensor,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        tree_mask: Tensor | None = None,
        max_seqlen_q: int,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float = 0.0,
        split_size: int | None = None,
        sink_tokens: int = 0,
    ) -> tuple[Tensor, Tensor]:
        q = args[0]
        scales = (None,) * (8 - len(args))
        out = hostile.poison_(torch.empty(q.shape, dtype=q.dtype))
        lse = hostile.poison_(torch.empty(q.shape[:2]))
        tensors = [*args, *scales, sinks, alibi_slopes, tree_mask, out, lse]
        library.paged_attention_on_warps(
            (TensorArgument * 13)(*map(as_argument, tensors)),
            ctypes.c_int64(max_seqlen_q),
            ctypes.c_double(q.shape[-1] ** -0.5 if scale is None else scale),
            ctypes.c_bool(causal),
            ctypes.c_int64(window or 0),
            ctypes.c_double(softcap),
            ctypes.c_int64(split_size or 0),
            ctypes.c_int64(sink_tokens),
            num_sms,
            capability,
        )
        return out, lse

    return call


def is_played(case: PagedAttentionCase) -> bool:
    """Whether the kernels that split keys are compiled for its dtype, it is theirs, some token is
    there for them, and lanes that take turns are done with it within seconds."""
    rows = max((q for q, _ in case.sequences), default=0) * case.num_q_heads // case.num_kv_heads
    pairs = sum(queries * keys for queries, keys in case.sequences)
    small = pairs * case.num_q_heads * case.head_dim <= 2**23
    return case.dtype == torch.bfloat16 and (case.tree or rows <= 64) and pairs > 0 and small


# Shares with parts of several pairs, on GPUs with and without an early start; and a multiprocessor
# for each pair of most cases, whose teams then have its keys together.
@pytest.mark.parametrize(("num_sms", "capability"), [(1, 8), (5, 9), (18, 9)])
@pytest.mark.parametrize("case", [c for c in CASES if is_played(c)], ids=lambda case: case.id)
def test_values(
    case: PagedAttentionCase, num_sms: int, capability: int, library: ctypes.CDLL
) -> None:
    check_values(kernels_of(library, num_sms, capability), case, "cpu")


def test_a_faulty_kernel_would_be_found(library: ctypes.CDLL) -> None:
    """That of a call without the mask: the causal order in its place."""
    kernels = kernels_of(library, 1, 8)
    case = PagedAttentionCase(((10, 40),), 2, 1, 64, tree=True)
    with pytest.raises(AssertionError, match="paged_attention result 0"):
        check_values(lambda *args, tree_mask, **options: kernels(*args, **options), case, "cpu")

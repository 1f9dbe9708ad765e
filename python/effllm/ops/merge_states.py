"""merge_states: attention over disjoint sets of keys, combined by their log-sum-exp."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops

_op = ops.merge_states.default


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attention results over disjoint sets of keys into that over all of them.

    For keys that many sequences share (cascade attention): read the shared prefix once for the
    queries of all sequences, each sequence's own keys apart, and merge.

        shared = paged_attention(
            q, k_cache, v_cache, prefix_pages, prefix_len, all_queries,
            max_seqlen_q=len(q), causal=False)      # one table row for all T query tokens
        own = paged_attention(
            q, k_cache, v_cache, own_pages, own_lens, cu_seqlens_q, max_seqlen_q=1)
        out, lse = merge_states((shared[0], own[0]), (shared[1], own[1]))

    An lse of -inf says that a state has no keys; its row of ``outs`` is not looked at. Arithmetic
    is fp32 and in the order of the list: equal inputs give equal bits.

    Args:
        outs: 1 to 32 tensors [T, HQ, D] of one dtype, fp16, bf16 or fp32, any strides with
            stride(-1) == 1. Rows that are 16-byte aligned everywhere are read 16 bytes at a time.
        lses: as many tensors fp32 [T, HQ], any strides: the natural logarithm of each row's sum of
            exponentials, as ``paged_attention`` returns it. NaN or +inf makes the row NaN.

    Returns:
        out [T, HQ, D] in the dtype of outs, and lse fp32 [T, HQ]; both contiguous. A row without
        keys in any state is 0 with lse -inf.

    Raises:
        RuntimeError: no states or too many, lists of different lengths, a wrong dtype, device,
            rank, shape or stride. The backward pass: this is an inference op.

    Source:
        csrc/attention/merge_states.h. Merging by log-sum-exp as in online softmax
        (arXiv:1805.02867); shared prefixes as in Hydragen (arXiv:2402.05099).
    """
    if not outs:
        # The dispatcher, which finds the device by the tensors, would answer in its own terms.
        raise RuntimeError("effllm::merge_states: outs must hold 1 to 32 tensors, got 0")
    return _op(outs, lses)


@torch.library.register_fake(_op.name())
def _fake(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    torch._check(
        0 < len(outs) == len(lses),
        lambda: (
            f"merge_states: outs and lses must be equally long and not empty, got {len(outs)} and "
            f"{len(lses)}"
        ),
    )
    shape = outs[0].shape
    torch._check(
        len(shape) == 3, lambda: f"merge_states: outs[0] must be [T, HQ, D], got {list(shape)}"
    )
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        torch._check(
            out.shape == shape and lse.shape == shape[:2],
            lambda index=index, out=out, lse=lse: (
                f"merge_states: state {index} must be {list(shape)} with lse {list(shape[:2])}, "
                f"got {list(out.shape)} and {list(lse.shape)}"
            ),
        )
    return outs[0].new_empty(shape), outs[0].new_empty(shape[:2], dtype=torch.float32)


refuse_backward(_op)


def merge_states_ref(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: a softmax over the states, in ``dtype``, as are the results."""
    states = torch.stack([lse.to(dtype) for lse in lses])  # [states, T, HQ]
    lse = states.logsumexp(0)
    # Rows without keys: any finite number in place of -inf makes all their weights 0.
    weights = torch.exp(states - lse.masked_fill(lse == -math.inf, 0.0))[..., None]
    values = torch.stack([out.to(dtype) for out in outs])
    out = (weights * values.where(states[..., None] != -math.inf, 0.0)).sum(0)
    return out, lse.masked_fill(lse == math.inf, math.nan)

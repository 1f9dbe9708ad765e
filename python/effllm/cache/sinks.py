"""Attention sinks: a learned logit per head that takes part in the softmax and has no value."""

from __future__ import annotations

from torch import Tensor

from .. import ops


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Attention with one more key per head, of score ``sinks[h]`` and value 0 (gpt-oss).

    Args:
        out, lse: ``[T, HQ, D]`` and fp32 ``[T, HQ]``, attention to the real keys.
        sinks: ``[HQ]``, any float dtype; None leaves ``out``.

    Returns:
        ``[T, HQ, D]``: ``out * sigmoid(lse - sinks)``, 0 in rows without a key.
    """
    if sinks is None:
        return out
    # A state like any other: nothing of size T is allocated for it.
    no_value = out.new_zeros(out.shape[-1]).expand_as(out)
    merged, _ = ops.merge_states((out, no_value), (lse, sinks.float().expand_as(lse)))
    return merged

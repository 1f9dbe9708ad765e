"""h2o_append: a new token's key and value into a cache of limited size."""

import math

import torch
from torch import Tensor

from .._load import ops
from ._kv_codes import as_bits, quantize_kv
from .kv_append import check_kv_shapes

_op = ops.h2o_append.default


def h2o_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scores: Tensor,
    slot_pos: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    positions: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    budget: int | None = None,
    recent: int,
    n_sink: int = 0,
    normalize: bool = False,
) -> None:
    """Write one new token for each sequence; where there is no room, in place of another one.

    Each KV head decides for itself. While it uses fewer slots than the budget, the token takes the
    next one. Else it takes the slot of the token with the lowest score among those that are neither
    one of the first ``n_sink`` of the text nor of the last ``recent``, the new one included:
    ``n_sink <= slot_pos <= position - recent``. Of equal scores the lowest position goes, so that
    scores that are all 0 keep the first tokens and a window (StreamingLLM); NaN counts as above all
    numbers. Where none may go, the one with the lowest position goes that is not one of the first
    n_sink, if need be one of these. The slot's score becomes 0 and its slot_pos the token's
    position. Nothing is moved: a key keeps the position, and so the rotation, that it came with.

    The next position is that of the text, not seq_lens, which counts the slots in use.

    Args:
        k, v: [B, HKV, D], fp16, bf16 or fp32, any strides with stride(-1) == 1; k rotated.
        k_cache, v_cache: [NP, P, HKV, D] in the dtype of k, in e4m3 (torch.float8_e4m3fn) or int8,
            or int4 as uint8 [NP, P, HKV, D / 2]: as kv_append writes them. In place.
        scores: fp32 [B, HKV, S], stride(-1) == 1: as h2o_attention counts them. In place.
        slot_pos: int32 [B, HKV, S], stride(-1) == 1: position in the text of the token in each
            slot. In place.
        seq_lens: int32 [B, HKV], stride(-1) == 1: slots in use, before the call without and
            afterwards with the new token. In place.
        page_table: int32 [B, HKV, MAXP], stride(-1) == 1: the page of each P slots. Heads may share
            pages, in which each has rows of its own: ``expand`` a table [B, 1, MAXP]. Entries but
            that of the slot that is written may be anything. Pages that sequences share must have
            been copied before the first eviction.
        positions: int64 [B]: of the new tokens in their texts, below 2^31; -1: no token.
        k_scale, v_scale: scales of quantised caches, [NP, P, HKV] fp32 or, of int4,
            [NP, P, HKV, 2] fp16. None for all other caches. In place.
        budget: slots that a head may use, from 1 to S and MAXP * P; None means S. A head that uses
            more, after a long prompt, keeps as many.
        recent: how many of the last tokens may not go.
        n_sink: how many of the first tokens may not go; less than the budget.
        normalize: whether scores are divided by how many queries have seen the token,
            position - slot_pos, so that early tokens have no head start.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape, stride or number; or, on the CPU, a
            position, length or page out of range, before anything is written. A GPU, which cannot
            raise, leaves the heads concerned as they are.

    Source:
        csrc/kvcache/h2o_append.h. H2O: Heavy-Hitter Oracle (arXiv:2306.14048), StreamingLLM
        (arXiv:2309.17453).
    """
    _op(
        k,
        v,
        k_cache,
        v_cache,
        scores,
        slot_pos,
        seq_lens,
        page_table,
        positions,
        k_scale,
        v_scale,
        budget=budget,
        recent=recent,
        n_sink=n_sink,
        normalize=normalize,
    )


@torch.library.register_fake(_op.name())
def _fake(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scores: Tensor,
    slot_pos: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    positions: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    budget: int | None = None,
    recent: int,
    n_sink: int = 0,
    normalize: bool = False,
) -> None:
    check_kv_shapes("h2o_append", "B", k, v, k_cache, v_cache, k_scale, v_scale)
    heads = k.shape[:2]
    torch._check(
        scores.dim() == 3 and scores.shape[:2] == heads and slot_pos.shape == scores.shape,
        lambda: (
            f"h2o_append: scores and slot_pos must be [B, HKV, S] = [{heads[0]}, {heads[1]}, ?], "
            f"got {list(scores.shape)} and {list(slot_pos.shape)}"
        ),
    )
    torch._check(
        seq_lens.shape == heads and page_table.dim() == 3 and page_table.shape[:2] == heads,
        lambda: (
            "h2o_append: seq_lens and page_table must be [B, HKV] and [B, HKV, MAXP] with [B, HKV] "
            f"= {list(heads)}, got {list(seq_lens.shape)} and {list(page_table.shape)}"
        ),
    )
    torch._check(
        positions.shape == k.shape[:1],
        lambda: f"h2o_append: positions must be [B] = [{k.shape[0]}], got {list(positions.shape)}",
    )


def h2o_append_ref(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scores: Tensor,
    slot_pos: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    positions: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    budget: int | None = None,
    recent: int,
    n_sink: int = 0,
    normalize: bool = False,
) -> tuple[Tensor, ...]:
    """Plain PyTorch, head after head: copies of all that h2o_append writes, in its order."""
    caches, scales = (
        [k_cache.clone(), v_cache.clone()],
        [scale.clone() for scale in (k_scale, v_scale) if scale is not None],
    )
    scores, slot_pos, seq_lens = scores.clone(), slot_pos.clone(), seq_lens.clone()
    budget, page_size = scores.shape[2] if budget is None else budget, k_cache.shape[1]
    for seq, position in enumerate(positions.tolist()):
        for head in range(k.shape[1] if position >= 0 else 0):
            slot = used = int(seq_lens[seq, head])
            if used >= budget:
                tokens, attention = slot_pos[seq, head, :used], scores[seq, head, :used]
                if normalize:
                    attention = attention / (position - tokens.long()).clamp(min=1).float()
                slot = _lowest(tokens.tolist(), attention.tolist(), n_sink, position - recent)
            page, offset = int(page_table[seq, head, slot // page_size]), slot % page_size
            for index, row in enumerate((k[seq, head], v[seq, head])):
                if scales:
                    row, scales[index][page, offset, head] = quantize_kv(row, k_cache.dtype)
                as_bits(caches[index])[page, offset, head] = as_bits(row)
            scores[seq, head, slot] = 0.0
            slot_pos[seq, head, slot] = position
            seq_lens[seq, head] = max(used, min(used + 1, budget))
    return (*caches, scores, slot_pos, seq_lens, *scales)


def _lowest(tokens: list[int], attention: list[float], first: int, last: int) -> int:
    """The slot that goes, by the positions of the tokens in the slots and their scores; those at
    ``first`` to ``last`` may."""

    def rank(slot: int) -> tuple[float, ...]:
        token, score = tokens[slot], attention[slot]
        if token < first:
            return 3, 0.0, token, slot
        if token > last:
            return 2, 0.0, token, slot
        return (1, 0.0, token, slot) if math.isnan(score) else (0, score, token, slot)

    return min(range(len(tokens)), key=rank)

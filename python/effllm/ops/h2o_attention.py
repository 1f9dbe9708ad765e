"""h2o_attention: a step of decoding that also counts how much attention each key gets."""

import torch
from torch import Tensor

from .._load import ops
from .attn_colsum import attn_colsum_ref
from .paged_attention import check_paged_shapes, paged_attention_ref

_op = ops.h2o_attention.default


def h2o_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scores: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``paged_attention`` of one query token for each sequence, which adds its weights to scores.

    scores[b, h, j] grows, in place, by the weights that the HQ / HKV query heads of KV head h give
    to the key in slot j of that head: ``exp(score - lse)``, a sink's share taken off. Sums are
    fp32, come in a fixed order and are never taken across sequences. What evicts by them is
    ``h2o_append``. On a CPU out and lse are those of paged_attention to the bit. On a GPU it is one
    launch for up to 8 query heads per KV head and D up to 128, of quantised caches 96 or 128;
    what is beyond takes paged_attention and ``attn_colsum``, which reads the keys again.

    Args:
        q: [B, HQ, D], fp16 or bf16; fp32 on the CPU only: the last token of each sequence, whose
            key and value are in the cache. Any strides with stride(-1) == 1; D is a multiple of 8
            up to 256, HQ a multiple of HKV.
        k_cache, v_cache: [NP, P, HKV, D] in the dtype of q, in e4m3 (torch.float8_e4m3fn) or int8,
            or int4 as uint8 [NP, P, HKV, D / 2]: as paged_attention takes them.
        scores: fp32 [B, HKV, S], stride(-1) == 1; S is at least the longest of seq_lens. Those
            behind a sequence's last key keep their values.
        page_table: int32 [B, HKV, MAXP]: the page of each P slots of a KV head; or [B, MAXP], of
            all heads together. Entries behind the last key may be anything.
        seq_lens: int32 [B, HKV], or [B] beside one table for all heads: slots in use; 0 gives a row
            of zeros.
        k_scale, v_scale: scales of quantised caches, [NP, P, HKV] fp32 or, of int4,
            [NP, P, HKV, 2] fp16. None for all other caches.
        sinks: fp32 [HQ], a logit per query head that has no key, as paged_attention takes it.
        scale: multiplies the scores of keys; None means 1 / sqrt(D).
        softcap: c > 0 turns each such score s into c * tanh(s / c); 0 leaves it.

    Returns:
        out [B, HQ, D] in the dtype of q, and lse fp32 [B, HQ], both contiguous, as from
        paged_attention.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape, stride or number; on the CPU also a length
            or page out of range. A GPU, which cannot raise, clamps those.

    Source:
        csrc/attention/h2o_attention.h. H2O: Heavy-Hitter Oracle (arXiv:2306.14048); summed over
        the query heads that share a KV head, which the paper's models do not have.
    """
    return _op(
        q,
        k_cache,
        v_cache,
        scores,
        page_table,
        seq_lens,
        k_scale,
        v_scale,
        sinks,
        scale=scale,
        softcap=softcap,
    )


@torch.library.register_fake(_op.name())
def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scores: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    check_paged_shapes(
        "h2o_attention", q, k_cache, v_cache, page_table, seq_lens, k_scale, v_scale, sinks
    )
    heads = (q.shape[0], k_cache.shape[2])
    torch._check(
        page_table.shape[0] == q.shape[0] and scores.dim() == 3 and scores.shape[:2] == heads,
        lambda: (
            "h2o_attention: page_table must be [B, ...] and scores [B, HKV, S] with B = "
            f"{q.shape[0]}, got {list(page_table.shape)} and {list(scores.shape)}"
        ),
    )
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def h2o_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scores: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float64,
    weights_dtype: torch.dtype = torch.float64,
    tensor_cores: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch in ``dtype``: scores as h2o_attention leaves them, out and lse;
    ``weights_dtype`` as in paged_attention_ref, ``tensor_cores`` as in attn_colsum_ref."""
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    out, lse = paged_attention_ref(
        q,
        k_cache,
        v_cache,
        page_table,
        seq_lens,
        starts,
        k_scale,
        v_scale,
        sinks,
        max_seqlen_q=1,
        scale=scale,
        softcap=softcap,
        dtype=dtype,
        weights_dtype=weights_dtype,
    )
    of_keys = attn_colsum_ref(
        q,
        k_cache,
        page_table,
        seq_lens,
        starts,
        lse,
        k_scale,
        sinks,
        max_seqlen_k=scores.shape[2],
        scale=scale,
        softcap=softcap,
        dtype=dtype,
        tensor_cores=tensor_cores,
    )
    return scores.to(dtype) + of_keys, out, lse

"""attn_colsum: how much attention each key gets from the queries of prompts."""

import math

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from ._kv_codes import as_bits, dequantize_kv
from .paged_attention import cache_rows, check_cu_seqlens, check_paged_shapes

_op = ops.attn_colsum.default
_REF_QUERIES = 512  # at a time: all scores of a long prompt in float64 would not fit


def attn_colsum(
    q: Tensor,
    k_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    lse: Tensor,
    k_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    max_seqlen_k: int,
    last_n: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Column sums of causal attention weights, over the queries and the query heads of a KV head.

    What ``paged_attention`` computes and does not keep: with its q and the lse that it returned,
    out[b, h, j] is the sum of ``exp(score - lse)`` over the queries of sequence b that see key j
    and over the HQ / HKV query heads that read KV head h. Queries stand behind the keys ahead of
    them as in paged_attention (bottom-right alignment), so that a prompt may come in chunks, whose
    sums add up. All of them are what H2O starts from; those of the last queries, what SnapKV asks.
    Sums are fp32 and come in a fixed order.

    Args:
        q: [T, HQ, D], fp16 or bf16; fp32 on the CPU only: as paged_attention takes it.
        k_cache: [NP, P, HKV, D] in the dtype of q, in e4m3 (torch.float8_e4m3fn) or int8, or int4
            as uint8 [NP, P, HKV, D / 2]: as paged_attention takes it.
        page_table: int32 [B, MAXP], or [B, HKV, MAXP] where KV heads have tables of their own.
        seq_lens: int32 [B], keys of each sequence, its query tokens included; beside tables of KV
            heads [B, HKV].
        cu_seqlens_q: int32 [B + 1], from 0: which query tokens are whose.
        lse: fp32 [T, HQ], of the same queries and keys; stride(-1) == 1.
        k_scale: scales of a quantised cache, [NP, P, HKV] fp32 or, of int4, [NP, P, HKV, 2] fp16.
        sinks: fp32 [HQ], if paged_attention had them: their share is not the keys'.
        max_seqlen_k: S of the result, at least the longest of seq_lens.
        last_n: how many queries of each sequence count, the last ones; None: all.
        scale: multiplies the scores; None means 1 / sqrt(D).
        softcap: c > 0 turns each score s into c * tanh(s / c); 0 leaves it.

    Returns:
        fp32 [B, HKV, S], contiguous: 0 for keys that no query sees and behind the last key.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape, stride or number; on the CPU also a length
            or page out of range. A GPU, which cannot raise, clamps those, and leaves out keys from
            S on. The backward pass: this is an inference op.

    Source:
        csrc/attention/attn_colsum.h. Scores of H2O (arXiv:2306.14048) and SnapKV
        (arXiv:2404.14469).
    """
    return _op(
        q,
        k_cache,
        page_table,
        seq_lens,
        cu_seqlens_q,
        lse,
        k_scale,
        sinks,
        max_seqlen_k=max_seqlen_k,
        last_n=last_n,
        scale=scale,
        softcap=softcap,
    )


@torch.library.register_fake(_op.name())
def _fake(
    q: Tensor,
    k_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    lse: Tensor,
    k_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    max_seqlen_k: int,
    last_n: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    check_paged_shapes(
        "attn_colsum", q, k_cache, k_cache, page_table, seq_lens, k_scale, k_scale, sinks
    )
    check_cu_seqlens("attn_colsum", page_table, cu_seqlens_q)
    torch._check(
        lse.shape == q.shape[:2],
        lambda: f"attn_colsum: lse must be [T, HQ] = {list(q.shape[:2])}, got {list(lse.shape)}",
    )
    return q.new_empty((page_table.shape[0], k_cache.shape[2], max_seqlen_k), dtype=torch.float32)


refuse_backward(_op)


def attn_colsum_ref(
    q: Tensor,
    k_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    lse: Tensor,
    k_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    max_seqlen_k: int,
    last_n: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float64,
    tensor_cores: bool = False,
) -> Tensor:
    """Plain PyTorch, one sequence and KV head after the other, in ``dtype``. With ``tensor_cores``
    the products of queries and keys are those of a GPU for 16-bit operands, in fp32."""
    num_kv_heads, dim = k_cache.shape[2], q.shape[2]
    page_size, group = k_cache.shape[1], q.shape[1] // num_kv_heads
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    base = lse.to(dtype)
    if sinks is not None:
        base = torch.logaddexp(base, sinks.to(dtype))
    base = base.masked_fill(lse == -math.inf, 0.0)
    shape = (page_table.shape[0], num_kv_heads, max_seqlen_k)
    sums = torch.zeros(shape, dtype=dtype, device=q.device)
    tables = page_table if page_table.dim() == 3 else page_table[:, None].expand(*shape[:2], -1)
    lengths = seq_lens if seq_lens.dim() == 2 else seq_lens[:, None].expand(shape[:2])
    starts = cu_seqlens_q.tolist()
    for index, of_heads in enumerate(lengths.tolist()):
        start, end = starts[index], starts[index + 1]
        if start == end:
            continue
        for head, num_keys in enumerate(of_heads):
            slot = torch.arange(num_keys, device=q.device)
            pages = tables[index, head, slot // page_size].long()
            of_head = slice(head, head + 1)
            of_cache = None if k_scale is None else k_scale[:, :, of_head]
            keys = cache_rows(k_cache[:, :, of_head], of_cache, pages, slot % page_size, dtype)
            of_q = slice(head * group, (head + 1) * group)
            first = max(start, end - last_n) if last_n is not None else start
            for begin in range(first, end, _REF_QUERIES):
                rows = slice(begin, min(begin + _REF_QUERIES, end))
                if tensor_cores:
                    cached = (k_cache[:, :, of_head], of_cache, pages, slot % page_size)
                    products = _tensor_core_products(q[rows, of_q], *cached).to(dtype)
                else:
                    products = torch.einsum("qgd,kd->gqk", q[rows, of_q].to(dtype), keys[:, 0])
                scores = products * scale
                if softcap > 0:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.exp(scores - base[rows, of_q].T[..., None])
                position = torch.arange(rows.start, rows.stop, device=q.device) - end + num_keys
                hidden = slot > position[:, None]
                sums[index, head, :num_keys] += weights.masked_fill(hidden, 0.0).sum((0, 1))
    return sums


def _tensor_core_products(
    q: Tensor, cache: Tensor, scale: Tensor | None, pages: Tensor, slots: Tensor
) -> Tensor:
    """q [Q, G, D] times keys of one head, fp32 [G, Q, S]. Codes are operands in fp16, which holds
    them exactly, and their scales meet the products."""
    keys = as_bits(cache)[pages, slots].view(cache.dtype)[:, 0]
    factor = None
    if scale is not None:
        of_keys = scale[pages, slots][:, 0]
        factor = (of_keys[:, 0] if cache.dtype == torch.uint8 else of_keys).float()
        ones = torch.ones_like(of_keys)
        if cache.dtype == torch.uint8:
            ones[:, 1] = of_keys[:, 1]  # the zeros
        keys = dequantize_kv(keys, ones, torch.float16)
    rows = q.transpose(0, 1).flatten(0, 1).to(keys.dtype)
    products = torch.mm(rows, keys.T, out_dtype=torch.float32)
    if factor is not None:
        products *= factor
    return products.view(q.shape[1], q.shape[0], -1)

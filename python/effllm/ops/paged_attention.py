"""paged_attention: queries against keys and values that live in pages."""

import math

import torch
from torch import Tensor

from .._autograd import refuse_backward
from .._load import ops
from ._kv_codes import as_bits, codes_per_row, dequantize_kv

_op = ops.paged_attention.default
_REF_QUERIES = 512  # at a time: all scores of a long prompt in float64 would not fit


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    split_size: int | None = None,
    sink_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * Q K^T) V`` for sequences of any lengths, prefill and decode in one batch.

    Query i of the n of a sequence with s keys stands at position s - n + i (bottom-right
    alignment): the new keys are already in the cache. Softmax and sums are fp32; weights, times
    the scales of values in 8 or 4 bits, are rounded to 16 bits before they meet the values on a
    GPU, and on a CPU with AVX-512 BF16 for bf16 q. NaN codes of e4m3, which kv_append never
    stores, need not give NaN. Lengths and tables are read on the device; nothing synchronises, so
    calls can be captured in CUDA graphs. Decoding costs the reading of the keys and values once;
    GQA heads share it.

    Args:
        q: [T, HQ, D], fp16 or bf16; fp32 on the CPU only. The query tokens of all sequences, one
            sequence after the other; any strides with stride(-1) == 1. D is a multiple of 8 up to
            256, HQ a multiple of HKV; query head h reads KV head h // (HQ // HKV).
        k_cache, v_cache: [NP, P, HKV, D] in the dtype of q, in e4m3 (torch.float8_e4m3fn) or int8,
            or int4 as uint8 [NP, P, HKV, D / 2], low nibble first: as kv_append writes them. Any
            page size P >= 1, any strides with stride(-1) == 1; on a GPU rows have to start at
            multiples of 16 bytes, or of the largest power of two that divides their bytes.
        page_table: int32 [B, MAXP]: the page of each P keys of a sequence. Entries that hold no
            visible key are not read and may be anything. Or int32 [B, HKV, MAXP]: each KV head has
            pages of its own, as after an eviction (H2O, arXiv:2306.14048), of which it reads its
            own part.
        seq_lens: int32 [B], keys of each sequence, its query tokens included; may be 0. With a
            table for each KV head int32 [B, HKV]: positions count the keys of that head.
        cu_seqlens_q: int32 [B + 1], from 0: sequence b owns query tokens cu_seqlens_q[b] up to, not
            including, cu_seqlens_q[b + 1]. Tokens past the last belong to no sequence.
        k_scale, v_scale: of caches in e4m3 or int8, [NP, P, HKV] fp32, any strides; of int4
            [NP, P, HKV, 2] fp16 (scale, zero). Slots that no query sees may hold NaN, as those of
            the caches. None for all other caches.
        sinks: fp32 [HQ], a logit per query head that is one more to divide by, without a key and a
            value (GPT-OSS): out becomes out / (1 + exp(sink - lse)). -inf is no sink, NaN gives
            NaN. None for no sinks.
        alibi_slopes: fp32 [HQ]: query head h takes slope[h] * distance from each score, after
            softcap, where the distance between query and key counts positions. Any finite slope;
            None for no biases.
        tree_mask: int64 [T]: the query tokens of each sequence are the nodes of a tree, as drafts
            to be verified are (``effllm._host.TokenTree.mask_bits``). Beside the keys ahead of all
            of them, token i of a sequence sees token j of it if bit j of its word is set and j < i,
            and itself: its path. Whatever counts positions (window, alibi_slopes, sink_tokens) does
            so as if the path were all that follows the keys ahead. -1 is causal order: the word of
            sequences without a tree. At most 64 query tokens per sequence, and no causal=False.
            None: all are in causal order.
        max_seqlen_q: at least the number of query tokens of the longest sequence; with a tree_mask
            at most 64.
        scale: multiplies the scores; None means 1 / sqrt(D).
        causal: whether a query sees no key behind its own position.
        window: how many keys a query sees at most, counted back from its own position, its own
            included; None means all.
        softcap: c > 0 turns each score s into c * tanh(s / c); 0 leaves it.
        split_size: a multiple of 64: decoding cuts the keys of every sequence into pieces of so
            many, counted from the first, and merges what they give in their order, so that the bits
            of a row depend on its sequence alone and not on the batch around it, as on a CPU they
            always do. Large pieces leave less to merge, but few sequences need many pieces to keep
            a GPU busy: 256 to 1024. It then takes 4 * (D + 2) bytes for a while, times B * HKV,
            times the pieces that MAXP pages have room for, times the HQ / HKV * max_seqlen_q rows,
            rounded up to 8 and 32 at most. None cuts keys as suits the batch and the GPU.
        sink_tokens: how many of a sequence's first keys a query sees, although its window has left
            them behind (StreamingLLM, arXiv:2309.17453); what lies between is not read. Without a
            window it changes nothing.

    Returns:
        out [T, HQ, D] in the dtype of q, and lse fp32 [T, HQ], the natural logarithm of the sum of
        the exponentials of the keys' scores, the sink's is not one of them; both contiguous. A row
        that sees no key is 0 with lse -inf.

    Raises:
        RuntimeError: a wrong dtype, device, rank, shape, stride or number; on the CPU also a length
            or page out of range. A GPU, which cannot raise, clamps those, and leaves query tokens
            beyond max_seqlen_q at 0. The backward pass: this is an inference op.

    Source:
        csrc/attention/paged_attention.h. Pages as in PagedAttention (arXiv:2309.06180), the online
        softmax of FlashAttention (arXiv:2205.14135), linear biases of ALiBi (arXiv:2108.12409).
    """
    return _op(
        q,
        k_cache,
        v_cache,
        page_table,
        seq_lens,
        cu_seqlens_q,
        k_scale,
        v_scale,
        sinks,
        alibi_slopes,
        tree_mask,
        max_seqlen_q=max_seqlen_q,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        split_size=split_size,
        sink_tokens=sink_tokens,
    )


@torch.library.register_fake(_op.name())
def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    split_size: int | None = None,
    sink_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    check_paged_shapes(
        "paged_attention", q, k_cache, v_cache, page_table, seq_lens, k_scale, v_scale, sinks
    )
    check_cu_seqlens("paged_attention", page_table, cu_seqlens_q)
    torch._check(
        alibi_slopes is None or alibi_slopes.shape == q.shape[1:2],
        lambda: f"paged_attention: alibi_slopes must be [HQ] = [{q.shape[1]}]",
    )
    of_tokens = q.shape[:1] if tree_mask is None else tree_mask.shape
    torch._check(
        of_tokens == q.shape[:1],
        lambda: f"paged_attention: tree_mask must be [T] = [{q.shape[0]}], got {list(of_tokens)}",
    )
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def check_paged_shapes(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """The relations between shapes that fake kernels of ops over a paged cache check."""
    torch._check(q.dim() == 3, lambda: f"{op}: q must be [T, HQ, D], got {list(q.shape)}")
    row = codes_per_row(q.shape[2], k_cache.dtype)
    torch._check(
        k_cache.dim() == 4 and k_cache.shape[3] == row,
        lambda: (
            f"{op}: k_cache must be [NP, P, HKV, D] = [?, ?, ?, {row}], got {list(k_cache.shape)}"
        ),
    )
    for name, of_cache in (("k_scale", k_scale), ("v_scale", v_scale)):
        torch._check(
            of_cache is None or of_cache.shape[:3] == k_cache.shape[:3],
            lambda name=name, of_cache=of_cache: (
                f"{op}: {name} must be [NP, P, HKV] = {list(k_cache.shape[:3])}, "
                f"got {list(of_cache.shape)}"
            ),
        )
    torch._check(
        v_cache.shape == k_cache.shape,
        lambda: (
            f"{op}: v_cache must have the shape of k_cache, {list(k_cache.shape)}, "
            f"got {list(v_cache.shape)}"
        ),
    )
    heads = k_cache.shape[2:3] if page_table.dim() == 3 else k_cache.shape[:0]
    torch._check(
        page_table.dim() in (2, 3)
        and seq_lens.shape == page_table.shape[:-1]
        and page_table.shape[1:-1] == heads,
        lambda: (
            f"{op}: seq_lens and page_table must be [B] and [B, MAXP], or [B, HKV] and "
            f"[B, HKV, MAXP] with HKV = {k_cache.shape[2]}, got {list(seq_lens.shape)} and "
            f"{list(page_table.shape)}"
        ),
    )
    torch._check(
        sinks is None or sinks.shape == q.shape[1:2],
        lambda: f"{op}: sinks must be [HQ] = [{q.shape[1]}]",
    )


def check_cu_seqlens(op: str, page_table: Tensor, cu_seqlens_q: Tensor) -> None:
    """The same of the bounds of sequences."""
    torch._check(
        cu_seqlens_q.dim() == 1 and cu_seqlens_q.shape[0] == page_table.shape[0] + 1,
        lambda: (
            f"{op}: cu_seqlens_q must be [B + 1] = [{page_table.shape[0] + 1}], "
            f"got {list(cu_seqlens_q.shape)}"
        ),
    )


refuse_backward(_op)


def paged_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    split_size: int | None = None,
    sink_tokens: int = 0,
    dtype: torch.dtype = torch.float64,
    weights_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, one sequence after the other: gather the pages, mask, softmax.

    All arithmetic and the results are in ``dtype``; the attention weights, times the scales of
    their values if these are quantised, are rounded to ``weights_dtype`` in between, as every
    16-bit implementation does before it multiplies by V.
    """
    num_tokens, num_heads, dim = q.shape
    page_size, group = k_cache.shape[1], num_heads // k_cache.shape[2]
    if page_table.dim() == 3:
        # Each KV head with its query heads is a problem of its own.
        results = []
        for head in range(k_cache.shape[2]):
            of_kv, of_q = slice(head, head + 1), slice(head * group, (head + 1) * group)
            results.append(
                paged_attention_ref(
                    q[:, of_q],
                    k_cache[:, :, of_kv],
                    v_cache[:, :, of_kv],
                    page_table[:, head],
                    seq_lens[:, head],
                    cu_seqlens_q,
                    None if k_scale is None else k_scale[:, :, of_kv],
                    None if v_scale is None else v_scale[:, :, of_kv],
                    None if sinks is None else sinks[of_q],
                    None if alibi_slopes is None else alibi_slopes[of_q],
                    tree_mask,
                    max_seqlen_q=max_seqlen_q,
                    scale=scale,
                    causal=causal,
                    window=window,
                    softcap=softcap,
                    sink_tokens=sink_tokens,
                    dtype=dtype,
                    weights_dtype=weights_dtype,
                )
            )
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=1)
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    out = torch.zeros(num_tokens, num_heads, dim, dtype=dtype, device=q.device)
    lse = torch.full((num_tokens, num_heads), -math.inf, dtype=dtype, device=q.device)
    starts = cu_seqlens_q.tolist()
    for index, num_keys in enumerate(seq_lens.tolist()):
        first_position = num_keys - (starts[index + 1] - starts[index])
        for start in range(starts[index], starts[index + 1], _REF_QUERIES):
            rows = slice(start, min(start + _REF_QUERIES, starts[index + 1]))
            position = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            position = position - starts[index] + first_position
            key = torch.arange(num_keys, device=q.device)
            visible = key < num_keys if not causal else key <= position
            if tree_mask is not None:
                visible, key, position = along_paths(tree_mask[rows], num_keys)
            if window is not None:
                in_head = (key < sink_tokens) & (sink_tokens > 0)
                visible = visible & ((key > position - window) | in_head)
            visible = visible.expand(position.shape[0], num_keys)
            # Table entries without a visible key may be absurd: they are not looked up.
            used = visible.any(0)
            slot = used.nonzero()[:, 0]
            pages, slots = page_table[index, slot // page_size].long(), slot % page_size
            keys, values = (
                cache_rows(cache, of_cache, pages, slots, dtype).repeat_interleave(group, dim=1)
                for cache, of_cache in ((k_cache, k_scale), (v_cache, v_scale))
            )
            scores = torch.einsum("qhd,khd->hqk", q[rows].to(dtype), keys) * scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            if alibi_slopes is not None:
                distance = (position - key[..., used]).abs().to(dtype)
                scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance
            scores = scores.masked_fill(~visible[:, used], -math.inf)
            row_lse = scores.logsumexp(-1)
            # Rows without a key: any finite number in place of -inf makes all their weights 0.
            base = row_lse.masked_fill(row_lse == -math.inf, 0.0)[..., None]
            weights = torch.exp(scores - base)
            factor = _weight_factor(v_scale, pages, slots, group, dtype)
            weights = (weights * factor).to(weights_dtype).to(dtype) / factor
            out[rows] = torch.einsum("hqk,khd->qhd", weights, values)
            if sinks is not None:
                # What the keys have of a softmax over them and the sink.
                out[rows] *= torch.sigmoid(base[..., 0].T - sinks.to(dtype))[..., None]
            lse[rows] = row_lse.T
    return out, lse


def along_paths(words: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of all query tokens of a sequence, by their ``words`` [n] of a tree_mask: which keys they
    see, bool [n, S]; where keys stand as each of them counts, [n, S]; where it stands itself,
    [n, 1]."""
    token = torch.arange(len(words), device=words.device)
    path = ((words[:, None] >> token) & 1).bool().tril(-1) | (token[:, None] == token)
    depth = path.cumsum(1) - path.long()
    # Keys ahead of all of them; fewer than none if there are more queries than keys.
    ahead = num_keys - len(words)
    before = torch.arange(max(ahead, 0), device=words.device).expand(len(words), -1)
    of_keys = slice(max(-ahead, 0), None)
    visible = torch.cat([torch.ones_like(before).bool(), path], 1)[:, of_keys]
    key = torch.cat([before, ahead + depth], 1)[:, of_keys]
    return visible, key, ahead + path.sum(1, keepdim=True) - 1


def _weight_factor(
    scale: Tensor | None, pages: Tensor, slots: Tensor, group: int, dtype: torch.dtype
) -> Tensor:
    """What weights [HQ, queries, S] are multiplied by before they are rounded: 1, or the scales of
    the values, brought into the range of a float16 by a power of two."""
    if scale is None or pages.numel() == 0:
        return torch.ones((), dtype=dtype, device=pages.device)
    of_value = scale[pages, slots].to(dtype)
    of_value = of_value[..., 0] if scale.dim() == 4 else of_value
    exponent = torch.frexp(of_value.abs().nan_to_num(0.0, 0.0).amax()).exponent
    factor = torch.ldexp(of_value.where(of_value != 0, 1.0), 14 - exponent)
    return factor.T.repeat_interleave(group, dim=0)[:, None]


def cache_rows(
    cache: Tensor, scale: Tensor | None, pages: Tensor, slots: Tensor, dtype: torch.dtype
) -> Tensor:
    """Keys or values [S, HKV, D] in ``dtype``."""
    rows = as_bits(cache)[pages, slots].view(cache.dtype)
    if scale is None:
        return rows.to(dtype)
    return dequantize_kv(rows, scale[pages, slots], dtype)

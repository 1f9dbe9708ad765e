"""transformers: ``attn_implementation="effllm"``, its mask, and the paged ``Cache``.

Three ways into the same op, by what the caller brings:

1. ``model(ids, effllm=PagedContext(cache, batch))``: tokens packed as [1, T]; k, v go to pages.
2. ``past_key_values=PagedCache(...)``: as ``model.generate`` calls it; padding is dropped, the real
   tokens go to pages.
3. neither: k, v [B, HKV, S, D] are read where they are, as one page of S tokens per sequence.

What cannot be honoured raises; nothing is silently ignored. A sliding window counts tokens, not
padded columns. Without a padding mask the model compiles without graph breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
)

from effllm import ops
from effllm.cache import PagedContext
from effllm.integrations.paged_cache import PagedCache

__all__ = ["PagedCache", "PagedContext", "effllm_attention", "effllm_mask"]

# Keywords with which some models change the scores; None and False mean "not used".
_UNSUPPORTED = {
    "output_attentions": "attention weights are never formed",
    "sinks": "attention sinks of another kind than s_aux",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
    "cu_seq_lens_q": "packed sequences; use PagedContext",
    "cu_seq_lens_k": "packed sequences; use PagedContext",
    "cu_seqlens": "packed sequences; use PagedContext",
    "block_indices": "block-sparse attention",
}


def effllm_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    effllm: PagedContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, HQ, S, D], key and value [B, HKV, SK, D] -> (out [B, S, HQ, D], None).

    ``attention_mask`` is what ``effllm_mask`` returned: bool [B, SK] or None. ``s_aux`` [HQ] are
    attention sinks. Raises ValueError for what paged attention cannot honour (dropout, 4-D masks,
    a position bias, ...).
    """
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"effllm: attention cannot honour {name} ({what})")
    if dropout:
        raise ValueError(f"effllm: attention has no dropout, got {dropout}; call model.eval()")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {
        "scale": scaling,
        "window": sliding_window,
        "softcap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.float(),
    }

    if effllm is not None:
        if not causal or query.shape[0] != 1:
            raise ValueError(
                "effllm: a PagedContext needs causal attention and tokens packed as [1, T], got "
                f"batch {query.shape[0]}"
            )
        packed = [_pack(x, None) for x in (query, key, value)]
        return effllm.attend(_layer_of(module), *packed, **options).unsqueeze(0), None

    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "effllm: attention takes a 2-D padding mask; custom masks and packed position_ids are "
            "not supported (see PagedContext for packed sequences)"
        )
    # Without causality a query needs no partner among the keys (cross attention), so no row is
    # dropped.
    rows = attention_mask[:, -query.shape[2] :] if attention_mask is not None and causal else None
    q = _pack(query, rows)
    paged = getattr(key, "effllm_cache", None)
    if paged is not None:
        cache, layer = paged
        context = cache.context(key, attention_mask, layer)
        out = context.attend(layer, q, _pack(key, rows), _pack(value, rows), **options)
    else:
        batch, _, columns, _ = query.shape
        lens_q = torch.full((batch,), columns, dtype=torch.int32, device=query.device)
        if rows is not None:
            lens_q = rows.sum(1, dtype=torch.int32)
        out = _attend_in_place(
            q, key, value, attention_mask, lens_q, columns, causal=causal, **options
        )
    return _unpack(out, rows, query), None


def _attend_in_place(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lens_q: Tensor,
    max_seqlen_q: int,
    **options: Any,
) -> Tensor:
    """q [T, HQ, D] against key and value [B, HKV, SK, D] seen as B pages of SK tokens."""
    batch, _, columns, _ = key.shape
    seq_lens = torch.full_like(lens_q, columns)
    if mask is not None:
        # A static cache is longer than the mask; its tail is never read.
        columns = mask.shape[1]
        seq_lens = mask.sum(1, dtype=torch.int32)
        # The keys of a sequence must start its page: move padding behind them, order kept.
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None]
        key = key[:, :, :columns].take_along_dim(order, dim=2)
        value = value[:, :, :columns].take_along_dim(order, dim=2)
    out, _ = ops.paged_attention(
        q,
        _as_pages(key),
        _as_pages(value),
        torch.arange(batch, dtype=torch.int32, device=q.device)[:, None],
        seq_lens,
        F.pad(lens_q.cumsum(0, dtype=torch.int32), (1, 0)),
        max_seqlen_q=max_seqlen_q,
        **options,
    )
    return out


def _as_pages(x: Tensor) -> Tensor:
    """[B, HKV, SK, D] as a cache [NP=B, P=SK, HKV, D]: the same memory, no copy."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _pack(x: Tensor, rows: Tensor | None) -> Tensor:
    """[B, H, S, D] -> [T, H, D] in row order, with the tokens that rows [B, S] names."""
    x = x.transpose(1, 2)
    return x.flatten(0, 1) if rows is None else x[rows]


def _unpack(out: Tensor, rows: Tensor | None, query: Tensor) -> Tensor:
    """[T, HQ, D] -> [B, S, HQ, D] like the query [B, HQ, S, D]; padding rows are 0."""
    batch, heads, columns, head_dim = query.shape
    if rows is None:
        return out.view(batch, columns, heads, head_dim)
    padded = out.new_zeros(batch, columns, heads, head_dim)
    padded[rows] = out
    return padded


def _layer_of(module: torch.nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ValueError(
            f"effllm: {type(module).__name__} has no layer_idx, so its pages are unknown"
        )
    return layer


def effllm_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The padding mask, bool [B, keys], or None when every key counts.

    Causality and windows reach the op as numbers. A mask function that is anything else (packed
    sequences, chunks, image blocks) gives an empty 4-D mask, which the attention refuses unless a
    PagedContext, which has lengths of its own, makes it irrelevant.
    """
    if not _is_plain(mask_function):
        return torch.ones(batch_size, 1, 0, 0, dtype=torch.bool, device=device)
    # A static cache hands out all of its columns, also those that no token has reached.
    filled = kv_length
    if mask_function is not bidirectional_mask_function:
        filled = min(kv_length, int(q_offset) + q_length - int(kv_offset))
    if attention_mask is None:
        if filled == kv_length:
            return None
        return torch.ones(batch_size, filled, dtype=torch.bool, device=device)
    mask = attention_mask[:, int(kv_offset) : int(kv_offset) + filled].to(torch.bool)
    return None if filled == kv_length and mask.all() else mask


def _is_plain(mask_function: Callable[..., Any]) -> bool:
    """Whether it is causal, bidirectional or causal with a sliding window, and nothing more."""
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        return True
    # A sliding window is and_masks(sliding_window_overlay(size), causal_mask_function): a closure
    # over that pair.
    cells = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    parts = next((cell for cell in cells if isinstance(cell, tuple)), ())
    names = [getattr(part, "__qualname__", "").split(".")[0] for part in parts]
    return names == ["sliding_window_overlay", "causal_mask_function"]


# Importing this module makes "effllm" known to `from_pretrained` and `set_attn_implementation`.
AttentionInterface.register("effllm", effllm_attention)
AttentionMaskInterface.register("effllm", effllm_mask)

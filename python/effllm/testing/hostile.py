"""Data and memory that make a wrong kernel fail loudly.

A kernel that reads what it must not read usually finds zeros, or yesterday's right answer, and
passes. Here such memory holds NaN, the largest integer, or a canary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ABSURD_PAGES = (2147480000, -1)
"""What page tables hold past their last page: a stale entry or a sentinel, neither a page."""

MAX_DRAWN = 2**24
"""A longer tensor repeats its values from here on: drawing gigabytes on the CPU takes minutes."""

CANARY = 0xA5
GUARD_BYTES = 512
"""A multiple of every alignment a kernel asks for, so that guarded tensors stay aligned."""


def normal(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    mean: float = 0.5,
    outliers: float = 1e-3,
) -> Tensor:
    """Normal data that hides no mistake: off-centre, so that sums do not cancel to zero, and with a
    few values 30 times as large, as activations have.

    Args:
        shape: sizes of the result.
        dtype: floating dtype of the result.
        device: where it goes; the values are the same everywhere.
        seed: decides the values.
        mean: added to every value.
        outliers: fraction of the elements that are enlarged.
    """
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    drawn = min(count, MAX_DRAWN)
    values = torch.randn(drawn, generator=generator) + mean
    enlarged = torch.rand(drawn, generator=generator) < outliers
    values = torch.where(enlarged, values * 30, values).to(device, dtype)
    return values.repeat(-(-count // max(drawn, 1)))[:count].view(shape)


def poison_(tensor: Tensor, mask: Tensor | None = None) -> Tensor:
    """Fill a tensor, or where ``mask`` (bool, broadcastable) is true, in place: NaN for floats, the
    largest value for integers, true for bool. Returns the tensor."""
    value: float | int = 1
    if tensor.dtype.is_floating_point:
        value = float("nan")
    elif tensor.dtype != torch.bool:
        value = torch.iinfo(tensor.dtype).max
    # 8-bit floats have no fill kernels of their own.
    is_float8 = tensor.dtype.is_floating_point and tensor.element_size() == 1
    values = tensor.float() if is_float8 else tensor
    filled = torch.full_like(values, value) if mask is None else values.masked_fill(mask, value)
    return tensor.copy_(filled)


def live_slots(page_table: Tensor, seq_lens: Tensor, num_pages: int, page_size: int) -> Tensor:
    """Which slots hold a key of some sequence: bool [NP, P], or [NP, P, HKV].

    Args:
        page_table: int32 [B, MAXP]; only the first ``ceil(seq_len / P)`` entries of a row are read.
            Or [B, HKV, MAXP], of which each KV head has a slot of its own.
        seq_lens: int32 [B], or [B, HKV].
        num_pages: NP of the cache.
        page_size: P of the cache.
    """
    if page_table.dim() == 3:
        heads = range(page_table.shape[1])
        of_heads = [
            live_slots(page_table[:, h], seq_lens[:, h], num_pages, page_size) for h in heads
        ]
        return torch.stack(of_heads, dim=2)
    live = torch.zeros(num_pages, page_size, dtype=torch.bool)
    for pages, length in zip(page_table.tolist(), seq_lens.tolist(), strict=True):
        for start in range(0, length, page_size):
            live[pages[start // page_size], : length - start] = True
    return live.to(page_table.device)


def poison_unused_slots_(cache: Tensor, page_table: Tensor, seq_lens: Tensor) -> Tensor:
    """Fill every slot of a cache [NP, P, HKV, D], or of its scales [NP, P, HKV, ...], that holds no
    key with NaN, in place: unused pages and the tails of last pages. ``0 * NaN`` is NaN, so masking
    by multiplication shows too."""
    live = live_slots(page_table, seq_lens, cache.shape[0], cache.shape[1])
    live = live.view(*live.shape, *[1] * (cache.dim() - live.dim()))
    return poison_(cache, ~live.to(cache.device))


def absurd_tails(page_table: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """A copy of a page table int32 [B, MAXP] or [B, HKV, MAXP] in which no entry past a sequence's
    last page is a page: they alternate between 2147480000 and -1."""
    columns = torch.arange(page_table.shape[-1], device=page_table.device)
    used = (seq_lens + page_size - 1) // page_size
    absurd = torch.tensor(ABSURD_PAGES, dtype=page_table.dtype, device=page_table.device)
    return torch.where(columns < used[..., None], page_table, absurd[columns % 2])


def odd_strides(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in layouts that a kernel which takes the pointer for dense gets wrong.

    Gaps between the elements are poisoned. "expanded" is the exception: it repeats the first slice
    of the first dimension, as stride 0 must. Compare each with what its ``.contiguous()`` gives.

    Args:
        tensor: at least one dimension, any dtype.

    Yields:
        A name for the test id, and the tensor.
    """
    for dim in range(tensor.dim()):
        size = tensor.shape[dim]
        doubled = list(tensor.shape)
        doubled[dim] = 2 * size
        every_other = (
            poison_(tensor.new_empty(doubled)).unflatten(dim, (size, 2)).select(dim + 1, 0)
        )
        yield f"every_other_{dim}", every_other.copy_(tensor)
    padded = list(tensor.shape)
    padded[-1] += 3
    # Rows that start at odd addresses: vector loads have to notice.
    offset = poison_(tensor.new_empty(padded)).narrow(-1, 1, tensor.shape[-1])
    yield "offset", offset.copy_(tensor)
    if tensor.dim() >= 2:
        yield "transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)
        yield "expanded", tensor[:1].expand_as(tensor)


def guarded(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous copy between two bands of canary bytes, and the check that they are intact.

    For everything a kernel writes into: pass the copy, then call the check, which raises
    AssertionError with the offset of the first byte that changed.
    """
    num_bytes = tensor.numel() * tensor.element_size()
    memory = torch.full(
        (GUARD_BYTES + num_bytes + GUARD_BYTES,), CANARY, dtype=torch.uint8, device=tensor.device
    )
    inner = memory[GUARD_BYTES : GUARD_BYTES + num_bytes].view(tensor.dtype).view(tensor.shape)
    inner.copy_(tensor)

    def check() -> None:
        for side, band, start in (
            ("before", memory[:GUARD_BYTES], -GUARD_BYTES),
            ("after", memory[GUARD_BYTES + num_bytes :], num_bytes),
        ):
            changed = (band != CANARY).nonzero().flatten().tolist()
            assert not changed, (
                f"{len(changed)} bytes {side} the tensor of {num_bytes} bytes were overwritten, "
                f"the first at byte {start + changed[0]}"
            )

    return inner, check


@contextmanager
def nan_allocations() -> Iterator[None]:
    """Within this context every tensor that torch allocates uninitialised starts poisoned.

    That includes what ops allocate in C++ through ``torch::stable::new_empty`` or ``empty``, on the
    CPU and on CUDA: both end in aten's ``empty``, which fills while deterministic algorithms are
    on. An output element that a kernel forgets is NaN (integers: the largest value) for certain.
    """
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch._C._get_deterministic_fill_uninitialized_memory()
    with warnings.catch_warnings():
        # warn_only: a torch op without a deterministic variant shall run, and not be reported.
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch._C._set_deterministic_fill_uninitialized_memory(True)
        try:
            yield
        finally:
            torch._C._set_deterministic_fill_uninitialized_memory(was_filling)
            torch.use_deterministic_algorithms(was_enabled, warn_only=was_warn_only)

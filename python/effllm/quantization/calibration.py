"""Calibration data: what may be given, and how a batch of it goes through a model."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Any]

# A tensor of token ids is cut into batches of about so many tokens.
_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Calibration:
    """Batches to send through a model.

    Attributes:
        batches: the arguments of the model, for each batch.
        digest: tells data apart, for runs that are resumed.
    """

    batches: tuple[Batch, ...]
    digest: str

    @classmethod
    def of(cls, data: Tensor | Iterable[Batch]) -> Calibration:
        """From token ids int64 ``[B, T]``, or batches: a tensor each, the model's only argument, or
        a mapping of keyword arguments.

        Raises:
            ValueError: no batch, or something else than these.
        """
        if isinstance(data, Tensor):
            if data.dim() != 2 or data.is_floating_point():
                raise ValueError(
                    "effllm.quantize_: calibration must be token ids [B, T] or an iterable of "
                    f"batches, got a {data.dtype} tensor {list(data.shape)}"
                )
            data = data.split(max(1, _TOKENS_PER_BATCH // max(1, data.shape[1])))
        batches = tuple(data)
        for batch in batches:
            if not isinstance(batch, Tensor | Mapping):
                raise ValueError(
                    "effllm.quantize_: a calibration batch must be a tensor or a mapping of the "
                    f"model's arguments, got {type(batch).__name__}"
                )
        if not any(_tensors(batch) and _tensors(batch)[0].numel() for batch in batches):
            raise ValueError("effllm.quantize_: calibration holds no tokens")
        digest = hashlib.blake2b(digest_size=16)
        for batch in batches:
            for tensor in _tensors(batch):
                update_digest(digest, tensor)
        return cls(batches, digest.hexdigest())

    def mask(self, index: int) -> Tensor | None:
        """Which tokens of a batch are no padding, ``[B, T]``; None if all."""
        batch = self.batches[index]
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        return mask if mask is not None and mask.dim() == 2 else None


def feed(model: nn.Module, batch: Batch) -> Tensor:
    """Runs the model on a batch, on the device of its first parameter, without a cache.

    Returns the output, or the tensor that comes first in it.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        arguments: dict[str, Any] = {}
        positional = [batch.to(device)]
    else:
        arguments = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        positional = []
    # Blocks run more than once, and would find their own keys in a cache.
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    out = model(*positional, **arguments)
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    return first


def update_digest(digest: Any, tensor: Tensor) -> None:
    """Adds dtype, shape and bytes of a tensor to a hash."""
    digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(plain.view(torch.uint8).numpy().tobytes())


def _tensors(batch: Batch) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    return [value for value in batch.values() if isinstance(value, Tensor)]

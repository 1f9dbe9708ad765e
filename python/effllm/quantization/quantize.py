"""quantize_: swaps the linear layers of a model for quantised ones, one at a time, in place."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from tqdm import tqdm

from effllm.nn.linear import Int4Linear
from effllm.nn.packed_linear import GROUP_SIZES

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Int4Config:
    """4-bit weights, 16- or 32-bit activations, rounding to nearest.

    Attributes:
        group_size: input channels per scale: 32, 64, 128, or -1 for one scale per output channel.
        symmetric: zero point 8 everywhere; otherwise one uint8 zero point per group.
    """

    group_size: int = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in (*GROUP_SIZES, -1):
            raise ValueError(
                "Int4Config: group_size must be 32, 64, 128 or -1 (one group per row), "
                f"got {self.group_size}"
            )


def quantize_(
    model: nn.Module,
    config: Int4Config | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Replaces every ``nn.Linear`` inside ``model`` by an ``Int4Linear``, in place; returns None.

    Args:
        model: its weights are on the device that shall compute (CPU or GPU), not on meta.
        config: defaults to ``Int4Config()``.
        filter_fn: ``filter_fn(module, name) -> bool`` picks among the layers found.

    A layer whose weight is shared with another module (a head tied to the embedding) is left as it
    is, and so are subclasses of ``nn.Linear``, whose forward may do more. Each layer is swapped in
    one assignment: after an error or Ctrl-C the model still runs, in part quantised.

    Raises:
        ValueError: a layer cannot be quantised (the message names it), or ``model`` itself is an
            ``nn.Linear`` and so has no parent to swap it in.
    """
    config = Int4Config() if config is None else config
    if type(model) is nn.Linear:
        raise ValueError(
            "effllm.quantize_: the model itself is an nn.Linear; use Int4Linear.from_linear(model)"
        )
    places = _linear_places(model)
    tied = _shared_weights(model)
    targets = []
    for linear, where in places.items():
        if filter_fn is not None and not filter_fn(linear, where[0]):
            continue
        if _storage_key(linear.weight) in tied:
            _logger.info("effllm.quantize_: %s shares its weight and is left as it is", where[0])
            continue
        targets.append(linear)

    for linear in tqdm(targets, desc="int4", unit="layer", leave=False, disable=not targets):
        try:
            quantised = Int4Linear.from_linear(linear, config.group_size, config.symmetric)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"effllm.quantize_: layer '{places[linear][0]}': {error}") from error
        for name in places[linear]:
            model.set_submodule(name, quantised)


def _linear_places(model: nn.Module) -> dict[nn.Linear, list[str]]:
    """All names of every nn.Linear: a module that is used twice is quantised once."""
    places: dict[nn.Linear, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            places[module].append(name)
    return places


def _shared_weights(model: nn.Module) -> set[tuple[int, int]]:
    """Keys of the parameters that two different modules hold."""
    owners: dict[tuple[int, int], int] = defaultdict(int)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[_storage_key(parameter)] += 1
    return {key for key, count in owners.items() if count > 1}


def _storage_key(parameter: Tensor) -> tuple[int, int]:
    """The same for two parameter objects over the same memory; meta tensors have no memory."""
    address = 0 if parameter.is_meta else parameter.data_ptr()
    return (address, 0) if address else (0, id(parameter))

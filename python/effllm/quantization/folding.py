"""Where the input channels of linear layers may be scaled without changing what a model computes.

``W x = (W diag(s)) (diag(s)^-1 x)``: the columns of the layers take s, and what makes their input,
a norm or a linear layer, gives it back. Whether a module's output goes just there, and linearly, is
not guessed from names: each place is tried, with powers of two, for which floating point is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effllm.quantization.collecting import InputGroup, Pass

# A wrong place changes nearly all elements, a right one none but by underflow.
_MAX_CHANGED = 0.01


@dataclass(frozen=True)
class Fold:
    """A module that can take over the input scales of the layers that follow it.

    Attributes:
        producer: with a weight ``[P]`` (a norm) or ``[P, ...]`` (a linear layer), and maybe a bias.
        consumers: all layers that get its output, K input channels each.
        heads: repetitions and head dimension, where key-value heads serve several query heads, so
            that K = repetitions * P; (1, P) otherwise.
        offset: what the producer adds to its weight when it is used: 1 for the norms of Gemma.
    """

    producer: nn.Module
    consumers: list[nn.Linear]
    heads: tuple[int, int]
    offset: float = 0.0

    def spread(self, scales: Tensor) -> Tensor:
        """``[K]`` of ``[P]``: each value for all input channels that the producer's goes to."""
        repeats, dim = self.heads
        return scales.view(-1, 1, dim).expand(-1, repeats, dim).reshape(-1)

    def gather(self, values: Tensor) -> Tensor:
        """``[P]`` of ``[K]``: the means over these channels."""
        repeats, dim = self.heads
        return values.view(-1, repeats, dim).mean(1).reshape(-1)

    def largest(self, values: Tensor) -> Tensor:
        """``[P]`` of ``[K]``: the maxima over these channels."""
        repeats, dim = self.heads
        return values.view(-1, repeats, dim).amax(1).reshape(-1)

    def apply(self, scales: Tensor) -> None:
        """Multiplies the consumers' columns by ``scales`` ``[P]``, and divides the producer."""
        weight = self.producer.weight
        assert isinstance(weight, Tensor)
        by_row = scales.view(-1, *[1] * (weight.dim() - 1))
        weight.copy_((weight.float() + self.offset) / by_row - self.offset)
        bias = getattr(self.producer, "bias", None)
        if bias is not None:
            bias.copy_(bias.float() / scales)
        for consumer in self.consumers:
            consumer.weight.copy_(consumer.weight.float() * self.spread(scales))

    def parameters(self) -> list[nn.Parameter]:
        """All that ``apply`` changes."""
        own = list(self.producer.parameters(recurse=False))
        own.extend(consumer.weight for consumer in self.consumers)  # type: ignore[misc]
        return own


def find_folds(
    module: nn.Module,
    groups: list[InputGroup],
    wanted: list[InputGroup],
    batches: Pass,
    fixed: set[nn.Module],
) -> list[tuple[InputGroup, Fold]]:
    """For each wanted group the place that takes its scales, as far as there is one.

    Args:
        groups: all groups of linear layers with a common input inside ``module``, in call order.
        batches: gives what runs ``module``; the first batch is used, its output is compared.
        fixed: modules that must stay as they are, since others hold their parameters too.
    """
    _, run = next(iter(batches()))
    expected = run()
    folds = []
    for group in wanted:
        earlier = [layer for g in groups[: groups.index(group)] for layer in g.linears]
        for fold in _candidates(module, group, earlier):
            if fixed.isdisjoint((fold.producer, *fold.consumers)) and _keeps(fold, run, expected):
                folds.append((group, fold))
                break
    return folds


def _candidates(module: nn.Module, group: InputGroup, earlier: list[nn.Linear]) -> Iterator[Fold]:
    """Modules of the right size: norms that make the input itself, then earlier layers."""
    k = group.linears[0].in_features
    for producer in group.producers:
        weight = getattr(producer, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.shape == (k,):
            yield Fold(producer, group.linears, (1, k))
            yield Fold(producer, group.linears, (1, k), offset=1.0)
    found = (getattr(inner, "head_dim", None) for inner in module.modules())
    dims = {dim for dim in found if isinstance(dim, int)}
    for layer in reversed(earlier):
        p = layer.out_features
        if p == k:
            yield Fold(layer, group.linears, (1, k))
        elif k % p == 0:
            yield from (
                Fold(layer, group.linears, (k // p, dim)) for dim in sorted(dims) if p % dim == 0
            )


def _keeps(fold: Fold, run: object, expected: Tensor) -> bool:
    """Whether the output stays what it was, for arbitrary scales."""
    assert callable(run)
    saved = [parameter.clone() for parameter in fold.parameters()]
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-1, 2, (saved[0].shape[0],), generator=generator)
    try:
        fold.apply((2.0**powers).to(saved[0].device))
        return float((run() != expected).double().mean()) < _MAX_CHANGED
    finally:
        for parameter, before in zip(fold.parameters(), saved, strict=True):
            parameter.copy_(before)

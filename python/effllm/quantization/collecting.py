"""Which linear layers share their input, and the statistics of these inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from effllm.quantization.calibration import Calibration, feed
from effllm.quantization.statistics import InputStatistics

Pass = Callable[[], Iterable[tuple[Tensor | None, Callable[[], Any]]]]
"""Gives, for each batch, which tokens count (None: all) and what runs the batch."""


def whole_pass(calibration: Calibration, model: nn.Module) -> Pass:
    """Runs the batches of the calibration through the whole model."""

    def batches() -> Iterator[tuple[Tensor | None, Callable[[], Tensor]]]:
        for i, batch in enumerate(calibration.batches):
            yield calibration.mask(i), partial(feed, model, batch)

    return batches


@dataclass
class InputGroup:
    """Linear layers that got the very same input, in the order of their calls.

    Attributes:
        linears: the layers.
        producers: modules without children whose output the input is.
        once: whether the first layer is called only once in a pass.
    """

    linears: list[nn.Linear] = field(default_factory=list)
    producers: list[nn.Module] = field(default_factory=list)
    once: bool = True


def trace_inputs(module: nn.Module, batches: Pass) -> list[InputGroup]:
    """The linear layers inside ``module`` by what they get, in the order of the calls.

    One batch shows it. Layers that it does not reach (experts) come last, each on its own.
    """
    groups: list[InputGroup] = []
    seen: list[tuple[Tensor, InputGroup]] = []
    outputs: list[tuple[Tensor, nn.Module]] = []

    def before(linear: nn.Module, args: tuple[Any, ...]) -> None:
        assert type(linear) is nn.Linear
        for group in groups:
            if linear in group.linears:
                group.once = False
                return
        for x, group in seen:
            if _same(x, args[0]):
                group.linears.append(linear)
                return
        producers = [inner for out, inner in outputs if _same(out, args[0])]
        groups.append(InputGroup([linear], producers))
        seen.append((args[0], groups[-1]))

    def after(inner: nn.Module, args: Any, out: Any) -> None:
        # Kept alive until the end, so that no later tensor gets the same address.
        if isinstance(out, Tensor):
            outputs.append((out, inner))

    linears = [m for m in module.modules() if type(m) is nn.Linear]
    leaves = [m for m in module.modules() if not list(m.children())]
    with _hooks(
        [linear.register_forward_pre_hook(before) for linear in linears]
        + [leaf.register_forward_hook(after) for leaf in leaves]
    ):
        for _, run in batches():
            run()
            break
    reached = {linear for group in groups for linear in group.linears}
    missed = [linear for linear in linears if linear not in reached]
    return groups + [InputGroup([linear], once=False) for linear in missed]


def collect(groups: list[InputGroup], batches: Pass) -> list[InputStatistics]:
    """The statistics of each group's input over all batches, padding left out.

    Raises:
        ValueError: an input that is not finite.
    """
    found: list[InputStatistics] = []
    mask: Tensor | None = None
    handles = []
    # What comes after the only input that is asked for need not be computed.
    enough = len(groups) == 1 and groups[0].once
    for group in groups:
        first = group.linears[0]
        inputs = InputStatistics(first.in_features, first.weight.device)
        found.append(inputs)

        def before(linear: nn.Module, args: tuple[Any, ...], into: Any = inputs) -> None:
            into.add(args[0] if mask is None else _kept(args[0], mask))
            if enough:
                raise _Enough

        handles.append(first.register_forward_pre_hook(before))
    with _hooks(handles):
        for batch_mask, run in batches():
            mask = batch_mask
            with suppress(_Enough):
                run()
    return found


class _Enough(Exception):
    """Ends a pass."""


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    """The tokens of ``x`` that the mask [B, T] keeps; all where the shapes do not tell which."""
    keep = mask.to(x.device).bool()
    if x.shape[:-1] == keep.shape:
        return x[keep]
    return x[keep.flatten()] if x.shape[:-1] == (keep.numel(),) else x


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        and a._version == b._version
    )

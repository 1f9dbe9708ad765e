"""The blocks of a model, and their inputs, so that they can run one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from effllm.nn.quantized_linear import QuantizedLinear
from effllm.quantization.calibration import Calibration, feed
from effllm.quantization.decoding import dequantize_

_HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Call:
    """Arguments of a block besides the hidden states: masks, position embeddings, ..."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def output(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """What the block returns for ``hidden``."""
        if self.by_name:
            return block(**{_HIDDEN: hidden}, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states that the block makes of ``hidden``."""
        out = self.output(block, hidden)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def to(self, device: torch.device) -> Call:
        """With all tensors there."""
        return Call(_moved(self.args, device), _moved(self.kwargs, device), self.by_name)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, inside of tuples, lists and mappings too, on the device; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        items = [_moved(inner, device) for inner in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def decoded(
    block: nn.Module,
    device: torch.device | None,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> nn.Module:
    """A copy on the device (None: where the block is) with dense layers: faster for many tokens,
    and the GPU's kernels take no fp32. ``dtypes`` are those that weights have had, by name."""
    twin = dequantize_(copied(block, device))
    for name, dtype in dtypes.items():
        linear = cast(nn.Linear, twin.get_submodule(name))
        linear.weight.data = linear.weight.data.to(dtype)
    return twin


def copied(block: nn.Module, device: torch.device | None) -> nn.Module:
    """A copy on the device; None: where the block is."""
    twin = copy.deepcopy(block)
    return twin if device is None else twin.to(device)


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name and modules of the list that holds most linear layers, quantised ones included: the
    blocks of a model.

    Without such a list, and where it holds a module twice, or linear layers themselves, there are
    none.
    """
    best, found = 0, ("", list[nn.Module]())
    linears = {m for m in model.modules() if type(m) is nn.Linear or isinstance(m, QuantizedLinear)}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        blocks = list(module)
        # The outermost list wins: experts of a block are a list as well.
        count = sum(inner in linears for block in blocks for inner in block.modules())
        bare = any(block in linears for block in blocks)
        if count > best and len(set(blocks)) == len(blocks) and not bare:
            best, found = count, (name, blocks)
    return found


class BlockStream:
    """The hidden states of all batches, on their way from block to block.

    Attributes:
        hidden: of each batch: the input of the block that is next. They stay where the model is.
    """

    def __init__(self, device: torch.device | None) -> None:
        """Without batches; ``device`` is where the blocks run that are given to it, None where they
        are those of the model."""
        self.hidden: list[Tensor] = []
        self._calls: list[list[Call]] = []
        self._masks: list[Any] = []
        self._device = device

    @classmethod
    def of(
        cls,
        model: nn.Module,
        blocks: list[nn.Module],
        calibration: Calibration,
        device: torch.device | None = None,
    ) -> BlockStream | None:
        """Runs what comes before the first block.

        None for a model whose forward does not call all blocks once, in order, each on just what
        the one before returned: only then may they run without the model.
        """
        stream = cls(device)
        # The first block is run once more than the others, so that is done on the device as well.
        first = None if device is None else partial(stream._output, decoded(blocks[0], device))
        for i, batch in enumerate(calibration.batches):
            recorder = _Recorder(blocks, first)
            try:
                with recorder.installed():
                    feed(model, batch)
                return None
            except _NoChain:
                return None
            except _AllCalled:
                stream.hidden.append(recorder.hidden)
                stream._calls.append(recorder.calls)
                stream._masks.append(calibration.mask(i))
        return stream

    def run(
        self, index: int, block: nn.Module
    ) -> Iterator[tuple[Tensor | None, Callable[[], Tensor]]]:
        """For each batch its mask and a function that runs ``block`` as the one of that index."""
        for hidden, calls, mask in zip(self.hidden, self._calls, self._masks, strict=True):
            call = calls[index]
            yield mask, partial(self._hidden_after, block, call, hidden)

    def advance(self, index: int, block: nn.Module) -> None:
        """Sends all batches through the block of that index: memory holds one block's inputs."""
        for i, calls in enumerate(self._calls):
            hidden = self.hidden[i]
            self.hidden[i] = self._hidden_after(block, calls[index], hidden).to(hidden.device)

    def _hidden_after(self, block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
        """What the block makes of a batch, on the block's device: only here are inputs moved, so
        that those of one batch are there at a time."""
        if self._device is None:
            return call.run(block, hidden)
        return call.to(self._device).run(block, hidden.to(self._device))

    def _output(self, block: nn.Module, call: Call, hidden: Tensor) -> Any:
        """All that the block returns for a batch, on the model's device."""
        assert self._device is not None
        out = call.to(self._device).output(block, hidden.to(self._device))
        return _moved(out, hidden.device)


class _AllCalled(Exception):
    """Ends a forward pass: what comes after the last block is not needed."""


class _NoChain(Exception):
    """Ends a forward pass that does more between its blocks than to call the next one."""


class _Recorder:
    """Stands in for the forward of all blocks during one pass of the model."""

    hidden: Tensor

    def __init__(
        self, blocks: list[nn.Module], first: Callable[[Call, Tensor], Any] | None
    ) -> None:
        """``first`` runs the first block, None: itself does."""
        self.blocks = blocks
        self._first = first
        self.calls: list[Call] = []
        self._tail: tuple[Any, ...] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                own = block.__dict__.get("forward")
                block.forward = self._stand_in(index, block.forward)
                stack.callback(_restore, block, own)
            yield

    def _stand_in(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            by_name = not args
            hidden = kwargs.pop(_HIDDEN, None) if by_name else args[0]
            if index == 0:
                self.hidden = hidden
            if index != len(self.calls) or hidden is not self.hidden:
                raise _NoChain
            self.calls.append(Call(args[1:], kwargs, by_name))
            if len(self.calls) == len(self.blocks):
                raise _AllCalled
            if index == 0:
                # Blocks return hidden states, or a tuple that starts with them.
                call = self.calls[0]
                out = self._first(call, hidden) if self._first else call.output(forward, hidden)
                self._tail = out[1:] if isinstance(out, tuple) else None
            return hidden if self._tail is None else (hidden, *self._tail)

        return record


def _restore(block: nn.Module, own: Any) -> None:
    del block.__dict__["forward"]
    if own is not None:
        block.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; then, by name, each module gets its own mode back."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]

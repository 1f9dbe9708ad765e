"""The blocks of a model, and their inputs, so that they can run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effllm.nn.packed_linear import PackedLinear
from effllm.quantization.calibration import Calibration, feed

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


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name and modules of the list that holds most linear layers, quantised ones included: the
    blocks of a model.

    Without such a list, and where it holds a module twice, or linear layers themselves, there are
    none.
    """
    best, found = 0, ("", list[nn.Module]())
    linears = {m for m in model.modules() if type(m) is nn.Linear or isinstance(m, PackedLinear)}
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
        hidden: of each batch: the input of the block that is next.
    """

    def __init__(self, hidden: list[Tensor], calls: list[list[Call]], masks: list[Any]) -> None:
        """Input of the first block, calls of each block, and mask, of each batch."""
        self.hidden = hidden
        self._calls = calls
        self._masks = masks

    @classmethod
    def of(
        cls, model: nn.Module, blocks: list[nn.Module], calibration: Calibration
    ) -> BlockStream | None:
        """Runs what comes before the first block.

        None for a model whose forward does not call all blocks once, in order, each on just what
        the one before returned: only then may they run without the model.
        """
        stream = cls([], [], [])
        for i, batch in enumerate(calibration.batches):
            recorder = _Recorder(blocks)
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
            yield mask, partial(call.run, block, hidden)

    def advance(self, index: int, block: nn.Module) -> None:
        """Sends all batches through the block of that index: memory holds one block's inputs."""
        for i, calls in enumerate(self._calls):
            self.hidden[i] = calls[index].run(block, self.hidden[i])


class _AllCalled(Exception):
    """Ends a forward pass: what comes after the last block is not needed."""


class _NoChain(Exception):
    """Ends a forward pass that does more between its blocks than to call the next one."""


class _Recorder:
    """Stands in for the forward of all blocks during one pass of the model."""

    hidden: Tensor

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks
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
                out = self.calls[0].output(forward, hidden)
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

"""A second device that is none: tensors of the CPU with a mark, which products may not mix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

OTHER = torch.device("cuda")
_HOME = torch.device("cpu")
_MOVES = {"copy_", "_to_copy", "_copy_from"}


class _Marks:
    """Where each storage is; those that were seen on neither side have no place yet."""

    def __init__(self) -> None:
        self.places: dict[int, tuple[StorageWeakRef, torch.device, int]] = {}
        self.peak = 0

    def place(self, tensor: Tensor) -> torch.device | None:
        found = self.places.get(tensor.untyped_storage()._cdata)
        return None if found is None or found[0].expired() else found[1]

    def put(self, tensor: Tensor, place: torch.device) -> Tensor:
        storage = tensor.untyped_storage()
        self.places[storage._cdata] = (StorageWeakRef(storage), place, storage.nbytes())
        return tensor

    def measure(self) -> None:
        """Bytes that live on the other device now."""
        self.places = {k: v for k, v in self.places.items() if not v[0].expired()}
        live = sum(size for _, place, size in self.places.values() if place == OTHER)
        self.peak = max(self.peak, live)


class _Ops(TorchDispatchMode):
    """Results are where the arguments are; arguments from both sides are an error."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in _MOVES:
            return out
        given = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # As on a GPU, numbers in tensors of the CPU go with anything.
        places = {place for t in given if t.dim() and (place := self.marks.place(t))}
        if len(places) > 1:
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device")
        for place in places:
            for t in (*given, *_pytree.tree_leaves(out)):
                if isinstance(t, Tensor) and self.marks.place(t) is None:
                    self.marks.put(t, place)
        return out


class _Functions(TorchFunctionMode):
    """Answers ``device``, moves tensors, and makes new ones where they are wanted."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.marks.place(args[0]) or func(*args)
        if name == "cpu":
            return self._moved(args[0], _HOME, {})
        if name == "to":
            place = kwargs.pop("device", None)
            if place is None and len(args) > 1 and isinstance(args[1], str | torch.device):
                place, args = args[1], (args[0], *args[2:])
            if place is None:
                return func(*args, **kwargs)
            values = (*args[1:], kwargs.get("dtype"))
            dtypes = [value for value in values if isinstance(value, torch.dtype)]
            tensor = args[0].to(*dtypes) if dtypes else args[0]
            return self._moved(tensor, torch.device(place), kwargs)
        place = kwargs.get("device")
        if place is not None and torch.device(place) == OTHER:
            kwargs["device"] = _HOME
            return self.marks.put(func(*args, **kwargs), OTHER)
        return func(*args, **kwargs)

    def _moved(self, tensor: Tensor, place: torch.device, options: dict[str, Any]) -> Tensor:
        if self.marks.place(tensor) == place and not options.get("copy"):
            return tensor
        if place.type == "meta":
            return tensor.to("meta")
        found = self.marks.put(tensor.detach().clone(), place)
        self.marks.measure()
        return found


@contextmanager
def other_device(*home: Tensor) -> Iterator[_Marks]:
    """Inside, ``torch.device("cuda")`` exists in name; ``home`` is on the CPU."""
    marks = _Marks()
    for tensor in home:
        marks.put(tensor, _HOME)
    with _Functions(marks), _Ops(marks):
        yield marks

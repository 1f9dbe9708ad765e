"""Which layers of a model are quantised, each with its config."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from effllm.quantization.method import Method

Filter = Callable[[nn.Module, str], bool]
Mixture = Mapping[str, Method | None]


@dataclass(frozen=True)
class Target:
    """A layer to quantise: the module, all of its names, and how."""

    linear: nn.Linear
    names: tuple[str, ...]
    method: Method


def find_targets(
    model: nn.Module, config: Method | Mixture, filter_fn: Filter | None
) -> tuple[list[Target], dict[str, str]]:
    """The layers to quantise in the model's order, and why others are not, by name.

    Only ``nn.Linear`` itself counts: the forward of a subclass may do more. Layers whose weight is
    shared with another module (a head tied to the embedding) are left out.

    Raises:
        ValueError: a pattern of a mixture matches no linear layer.
    """
    places: dict[nn.Linear, list[str]] = defaultdict(list)
    # A module that is used twice is quantised once.
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            places[module].append(name)
    if not isinstance(config, Method):
        _check_patterns(config, [names[0] for names in places.values()])
    tied = _shared_weights(model)
    targets, skipped = [], {}
    for linear, names in places.items():
        method = config if isinstance(config, Method) else _match(config, names[0])
        if filter_fn is not None and not filter_fn(linear, names[0]):
            skipped[names[0]] = "filter_fn"
        elif method is None:
            skipped[names[0]] = "config"
        elif _storage_key(linear.weight) in tied:
            skipped[names[0]] = "it shares its weight"
        else:
            targets.append(Target(linear, tuple(names), method))
    return targets, skipped


def _match(mixture: Mixture, name: str) -> Method | None:
    """That of the first pattern which matches; layers that no pattern matches are left alone."""
    for pattern, method in mixture.items():
        if fnmatch.fnmatchcase(name, pattern):
            return method
    return None


def _check_patterns(mixture: Mixture, names: list[str]) -> None:
    for pattern, method in mixture.items():
        if method is not None and not isinstance(method, Method):
            raise ValueError(
                f"effllm.quantize_: config['{pattern}'] must be a config or None, got {method!r}"
            )
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"effllm.quantize_: the pattern '{pattern}' matches none of the linear layers "
                f"({', '.join(names[:4])}, ...)"
            )


def sharing_modules(model: nn.Module) -> set[str]:
    """Names of the modules with a parameter that another module holds as well."""
    shared = _shared_weights(model)
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if any(_storage_key(p) in shared for p in module.parameters(recurse=False))
    }


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

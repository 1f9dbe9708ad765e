"""Hooks into other libraries. Importing effllm imports none of them.

``register_on_import`` makes ``attn_implementation="effllm"`` and the quantised checkpoints that
effllm reads known to transformers as soon as transformers' models are imported, or at once if they
already are. ``use_quantizer`` says which checkpoints ``from_pretrained`` gives to effllm.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Literal

# The module that defines AttentionInterface. `import transformers` alone is lazy and cheap; this
# one is imported with the first model.
_TRIGGER = "transformers.modeling_utils"

_MODULES = {
    "effllm.integrations.transformers": "attn_implementation='effllm' is not available",
    "effllm.integrations.quantizer": "from_pretrained does not know effllm's quantised layers",
}

When = Literal["missing", "always", "never"]
_when: When = "missing"


def use_quantizer(when: When) -> None:
    """Says which quantised checkpoints ``from_pretrained`` of transformers loads with effllm.

    Args:
        when: "missing", the default: those for which transformers lacks a package that it needs
            (gptqmodel for AWQ, gptqmodel and optimum for GPTQ, compressed_tensors, bitsandbytes),
            so that no call that works without effllm changes. "always": these formats, whatever is
            installed. "never": none. FP8 needs no package and so stays with transformers. It
            applies to calls from now on, in all threads.

    Raises:
        ValueError: another ``when``.
    """
    global _when
    if when not in ("missing", "always", "never"):
        raise ValueError(f"effllm: when must be 'missing', 'always' or 'never', got {when!r}")
    _when = when


def quantizer_use() -> When:
    """What ``use_quantizer`` was told last."""
    return _when


def register_on_import() -> None:
    """Registers with transformers now or later; calling it again changes nothing."""
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


def _register() -> None:
    for module, lost in _MODULES.items():
        try:
            # Its last statements register. Where somebody imports it first, it is only half
            # imported here and registers by itself in a moment.
            importlib.import_module(module)
        except (ImportError, AttributeError, KeyError) as error:
            # An unknown transformers must not break `import transformers` for everybody else.
            warnings.warn(
                f"effllm: {lost}, because this transformers has another interface (needs 5.17 or "
                f"newer): {error}",
                stacklevel=2,
            )


class _AfterTransformers(MetaPathFinder):
    """Finds the trigger module as the other finders do, and registers once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _register_after(spec.loader)
                return spec
        return None


def _register_after(loader: Loader) -> None:
    """Makes this loader register once it has run its module."""
    run_module = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run_module(module)
        _register()

    loader.exec_module = exec_module  # type: ignore[method-assign]

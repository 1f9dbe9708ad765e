"""Hooks into other libraries. Importing effllm imports none of them.

``register_on_import`` makes ``attn_implementation="effllm"`` known to transformers as soon as
transformers' models are imported, or at once if they already are.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# The module that defines AttentionInterface. `import transformers` alone is lazy and cheap; this
# one is imported with the first model.
_TRIGGER = "transformers.modeling_utils"


def register_on_import() -> None:
    """Registers with transformers now or later; calling it again changes nothing."""
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


def _register() -> None:
    try:
        # Its last statements register. Where somebody imports it first, it is only half imported
        # here and registers by itself in a moment.
        importlib.import_module("effllm.integrations.transformers")
    except (ImportError, AttributeError) as error:
        # An unknown transformers must not break `import transformers` for everybody else.
        warnings.warn(
            f"effllm: attn_implementation='effllm' is not available, because this transformers "
            f"has another interface (needs 5.17 or newer): {error}",
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

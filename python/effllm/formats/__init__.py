"""Quantised checkpoints: reading what people have, writing it, and saying what is in it.

``effllm.load`` makes a model of a folder, ``effllm.save`` a folder of a model, and ``inspect``
tells what is in one. Below them is one module per format, ``awq``, ``gptq`` and
``compressed_tensors``: functions that turn tensors as they are on disk into a ``GroupedWeight`` and
back. ``gguf`` has files of its own kind.
"""

from effllm.formats.checkpoint import Checkpoint, CheckpointError
from effllm.formats.grouped import GroupedWeight
from effllm.formats.inspecting import inspect
from effllm.formats.loading import load
from effllm.formats.report import LayerReport, LoadReport
from effllm.formats.saving import save

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "GroupedWeight",
    "LayerReport",
    "LoadReport",
    "inspect",
    "load",
    "save",
]

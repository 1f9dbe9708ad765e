"""Quantised checkpoints: reading what people have, writing it, and saying what is in it.

``effllm.load`` makes a model of a folder, ``effllm.save`` a folder of a model, and ``inspect``
tells what is in one. Below them is one module per format, ``awq``, ``gptq``,
``compressed_tensors``, ``scaled`` (FP8 and other codes of a byte), ``sparse`` and ``bitsandbytes``:
functions on tensors as they are on disk, of which ``reading`` makes what ``weights`` names.
``gguf`` has files of its own kind.
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

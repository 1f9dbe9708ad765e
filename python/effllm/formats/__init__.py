"""The formats that quantised checkpoints come in, as functions from stored tensors to codes.

One module per format: ``awq``, ``gptq``, ``compressed_tensors``. Each turns tensors as they are on
disk into a ``GroupedWeight`` and back.
"""

from effllm.formats.grouped import GroupedWeight

__all__ = ["GroupedWeight"]

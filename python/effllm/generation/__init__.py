"""The reference generation loop over the paged cache."""

from effllm.generation.generate import Generation, generate

__all__ = ["Generation", "generate"]

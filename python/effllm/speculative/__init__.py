"""Speculative decoding: what drafts the tokens that a model then verifies in one pass."""

from effllm._host import TokenTree

from .medusa import MedusaHeads

__all__ = ["MedusaHeads", "TokenTree"]

"""Speculative decoding: what drafts the tokens that a model then verifies in one pass."""

from effllm._host import TokenTree

from .draft import Draft, DraftRequest, Drafts, MedusaDraft, NGramDraft
from .medusa import MedusaHeads
from .model_draft import ModelDraft

__all__ = [
    "Draft",
    "DraftRequest",
    "Drafts",
    "MedusaDraft",
    "MedusaHeads",
    "ModelDraft",
    "NGramDraft",
    "TokenTree",
]

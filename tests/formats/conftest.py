"""Fixtures of the tests of formats."""

from tiny_models import llama, one_thread

__all__ = ["llama", "one_thread"]

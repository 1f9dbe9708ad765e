"""Fixtures of the tests of quantisation."""

from tiny_models import llama, one_thread

__all__ = ["llama", "one_thread"]

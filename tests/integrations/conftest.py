"""The fixtures of tests/tiny_models.py."""

from tiny_models import llama, one_thread

__all__ = ["llama", "one_thread"]

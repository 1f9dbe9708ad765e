"""Granularity: which elements of a matrix share a scale, in the same words everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["tensor", "channel", "token", "group", "block"]


@dataclass(frozen=True)
class Granularity:
    """Which elements of a matrix share one scale, zero point or codebook.

    Made by ``tensor()``, ``channel()``, ``token()``, ``group(n)`` and ``block(m, n)``. A weight is
    ``[N, K]``, one row per output channel; activations are ``[T, K]``, one row per token.

    Attributes:
        kind: the word it was made by.
        rows: of a block; else 1 for a group, 0 for what the matrix decides.
        columns: of a block or group; else 0.
    """

    kind: Kind
    rows: int = 0
    columns: int = 0

    def __post_init__(self) -> None:
        sizes = {"group": (self.columns,), "block": (self.rows, self.columns)}.get(self.kind, ())
        if any(size < 1 for size in sizes):
            raise ValueError(f"Granularity.{self} must have sizes of at least 1")

    @classmethod
    def tensor(cls) -> Granularity:
        """One for all."""
        return cls("tensor")

    @classmethod
    def channel(cls) -> Granularity:
        """One per channel: per row of a weight, per column of activations."""
        return cls("channel")

    @classmethod
    def token(cls) -> Granularity:
        """One per token: per row of activations; weights have none."""
        return cls("token")

    @classmethod
    def group(cls, n: int) -> Granularity:
        """One per n consecutive columns of each row. Raises ValueError for n < 1."""
        return cls("group", 1, n)

    @classmethod
    def block(cls, m: int, n: int) -> Granularity:
        """One per block of m rows and n columns. Raises ValueError for a size < 1."""
        return cls("block", m, n)

    def weight_tile(self, n: int, k: int) -> tuple[int, int]:
        """(rows, columns) of a weight ``[n, k]`` that share one scale; tiles at the edge are cut.

        Raises ValueError for ``token()``.
        """
        if self.kind == "token":
            raise ValueError("Granularity.token() is of activations; weights have channel()")
        return {"tensor": (n, k), "channel": (1, k)}.get(self.kind, (self.rows, self.columns))

    def activation_tile(self, t: int, k: int) -> tuple[int, int]:
        """(tokens, columns) of activations ``[t, k]`` that share one scale."""
        whole = {"tensor": (t, k), "channel": (t, 1), "token": (1, k)}
        return whole.get(self.kind, (self.rows, self.columns))

    def __str__(self) -> str:
        arguments = {"group": f"{self.columns}", "block": f"{self.rows}, {self.columns}"}
        return f"{self.kind}({arguments.get(self.kind, '')})"

"""Granularity: which elements share a scale, as a map that is written out here."""

from __future__ import annotations

import pytest
import torch

from effllm.quantization import Granularity, LinearConfig
from effllm.quantization.uniform import from_tiles, to_tiles

WORDS = [
    (Granularity.tensor(), "tensor()", (7, 100), (7, 100)),
    (Granularity.channel(), "channel()", (1, 100), (7, 1)),
    (Granularity.group(32), "group(32)", (1, 32), (1, 32)),
    (Granularity.block(4, 64), "block(4, 64)", (4, 64), (4, 64)),
]


@pytest.mark.parametrize(("granularity", "text", "weight", "activation"), WORDS, ids=lambda x: "")
def test_tiles(
    granularity: Granularity, text: str, weight: tuple[int, int], activation: tuple[int, int]
) -> None:
    assert str(granularity) == text
    assert granularity.weight_tile(7, 100) == weight
    assert granularity.activation_tile(7, 100) == activation


def test_tokens_are_of_activations() -> None:
    assert Granularity.token().activation_tile(7, 100) == (1, 100)
    with pytest.raises(ValueError, match=r"token\(\) is of activations; weights have channel\(\)"):
        Granularity.token().weight_tile(7, 100)


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 100), (4, 64), (3, 1), (16, 128)])
def test_a_tile_holds_its_block_of_the_matrix(rows: int, columns: int) -> None:
    matrix = torch.randn(7, 100)
    tiles = to_tiles(matrix, rows, columns)
    assert tiles.shape == (-(-7 // rows), -(-100 // columns), rows * columns)
    for i in range(tiles.shape[0]):
        for j in range(tiles.shape[1]):
            block = matrix[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            padded = torch.zeros(rows, columns)
            padded[: block.shape[0], : block.shape[1]] = block
            assert torch.equal(tiles[i, j], padded.flatten())
    assert torch.equal(from_tiles(tiles, rows, columns, 7, 100), matrix)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Granularity.group(0), r"Granularity\.group\(0\) must have sizes of at least 1"),
        (lambda: Granularity.block(2, -1), r"block\(2, -1\) must have sizes of at least 1"),
        (lambda: LinearConfig(5), "LinearConfig: bits must be 2, 3, 4 or 8, got 5"),
        (lambda: LinearConfig(4, Granularity.token()), r"or block\(m, n\) .*, got token\(\)"),
        (lambda: LinearConfig(4, Granularity.group(48)), r"\(32, 64, 128\), got group\(48\)"),
    ],
)
def test_errors(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()

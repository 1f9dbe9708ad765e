"""The rows of rope_kv_append's GPU kernel, proved without a GPU: the kernel's own headers, on a
warp whose lanes take turns, against the op on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_on_cpu import TensorArgument, as_argument, compiled
from torch import Tensor

from effllm.ops import rope_kv_append
from effllm.ops._kv_codes import QUANTIZED_KV, as_bits
from effllm.ops.rope_kv_append import rope_kv_append_ref
from effllm.testing import hostile
from effllm.testing.cases.rope_kv_append import CASES, RopeKvAppendCase
from effllm.testing.compare import assert_equal

MAX_TOKENS = 100
"""A lane's turn takes a microsecond."""

Rows = Callable[..., tuple[Tensor, bool]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """rope_kv_append as the GPU does it, and whether in vectors of 8."""
    folder = tmp_path_factory.mktemp("rotary_row")
    function = compiled("rotary_row.cpp", folder).rope_kv_append_rows

    def call(*args: Tensor, interleaved: bool = False) -> tuple[Tensor, bool]:
        out = hostile.poison_(torch.empty(args[0].shape, dtype=args[0].dtype))
        tensors = (TensorArgument * 11)(*map(as_argument, args))
        is_wide = function(tensors, ctypes.c_bool(interleaved), ctypes.c_void_p(out.data_ptr()))
        return out, bool(is_wide)

    return call


def assert_same(found: Any, out: Tensor, wanted: Any) -> None:
    for index, (tensor, expected) in enumerate(
        zip((*found[6:8], *found[9:], out), wanted, strict=True)
    ):
        assert_equal(as_bits(tensor), as_bits(expected), name=f"result {index}")


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.num_tokens <= MAX_TOKENS and c.head_dim > 0],  # 0: no launch
    ids=lambda case: case.id,
)
def test_rows_are_those_of_the_cpu(case: RopeKvAppendCase, rows: Rows) -> None:
    args, options = case.make("cpu")
    out, is_wide = rows(*args, **options)
    half = (case.head_dim if case.rotary_dim is None else case.rotary_dim) // 2
    assert is_wide == (case.head_dim % 8 == half % (4 if case.interleaved else 8) == 0)
    wanted, _ = case.make("cpu")
    wanted_out = rope_kv_append(*wanted, **options)
    assert_same(args, out, (*wanted[6:8], *wanted[9:], wanted_out))


@pytest.mark.parametrize("kv_dtype", [None, *QUANTIZED_KV])
@pytest.mark.parametrize("interleaved", [False, True])
def test_unaligned_rows(interleaved: bool, kv_dtype: str | None, rows: Rows) -> None:
    """Each argument in turn at odd addresses: single elements, with NaN beside them."""
    case = RopeKvAppendCase(5, 2, 64, 4, torch.float16, num_heads=3, kv_dtype=kv_dtype)
    for index in (0, 1, 2, 3, 4, 6, 7):
        args = list(case.make("cpu")[0])
        args[index] = dict(hostile.odd_strides(as_bits(args[index])))["offset"].view(
            args[index].dtype
        )
        expected = rope_kv_append_ref(*args, interleaved=interleaved)
        out, is_wide = rows(*args, interleaved=interleaved)
        assert not is_wide
        assert_same(args, out, expected)


@pytest.mark.parametrize("dim", [6, 64])
@pytest.mark.parametrize("kv_dtype", [None, "e4m3", "int4"])
def test_data_out_of_range(kv_dtype: str | None, dim: int, rows: Rows) -> None:
    """Slots are skipped; of wild positions nothing is read, and what they would rotate is NaN."""
    case = RopeKvAppendCase(9, 2, dim, 4, rotary_dim=dim // 4 * 2, skip_every=None)
    args, _ = replace(case, kv_dtype=kv_dtype).make("cpu")
    sane = [tensor.clone() for tensor in args]
    args[8][:3] = torch.tensor([args[6].shape[0] * args[6].shape[1], -2, -(2**63)])
    sane[8][:3] = -1
    args[5][3:5] = torch.tensor([case.max_position, -(2**63)])
    for index in (3, 4):
        sane[index] = torch.cat([sane[index], sane[index][:1] * torch.nan])
    sane[5][3:5] = case.max_position
    expected = rope_kv_append_ref(*sane)
    out, _ = rows(*args)
    assert_same(args, out, expected)
    assert out[3:5, :, : dim // 4 * 2].isnan().all()

"""Devices, seeds and memory for all tests."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from effllm.testing import hostile


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "sanitizer: small enough to run under compute-sanitizer (tests/gpu_check.sh)"
    )


def missing_gpu() -> str | None:
    """Why tests with the gpu marker cannot run here; None if they can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU that this torch can use"
    from effllm import _load

    problem = _load.status().cuda_problem
    return f"no effllm CUDA library: {problem}" if problem else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    reason = missing_gpu()
    if reason and os.environ.get("EFFLLM_REQUIRE_GPU"):
        # A run on a GPU machine must not turn green by skipping everything.
        pytest.fail(f"EFFLLM_REQUIRE_GPU is set, but there is {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each test that takes it runs on the CPU, and on the GPU where there is one."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Everything allocated uninitialised during the test starts as NaN."""
    with hostile.nan_allocations():
        yield

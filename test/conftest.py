"""Fixtures of the operator tests: each runs on the CPU reference and, with the same code, on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common import cuda_condition


@pytest.fixture(params=["cpu"] if cuda_condition() else ["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["cpu", "fake"] + ([] if cuda_condition() else ["cuda", "fake cuda"]))
def device_or_fake(request: pytest.FixtureRequest) -> Iterator[str]:
    """Also under FakeTensorMode, where tensors have no memory."""
    kind = request.param
    if not kind.startswith("fake"):
        yield kind
        return
    with FakeTensorMode():
        yield "cuda" if kind == "fake cuda" else "cpu"


@pytest.fixture(autouse=True)
def _fresh_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cuda() -> str:
    """For tests that need a GPU: skipped on machines without one."""
    reason = cuda_condition()
    if reason:
        pytest.skip(reason)
    return "cuda"


@pytest.fixture
def two_cuda_devices() -> tuple[str, str]:
    """For tests that need two GPUs."""
    reason = cuda_condition() or ("there is one GPU" if torch.cuda.device_count() < 2 else "")
    if reason:
        pytest.skip(reason)
    return "cuda:0", "cuda:1"


@pytest.fixture(params=[2, 4])
def several_gpus(request: pytest.FixtureRequest) -> int:
    """How many, for tests that give each process one."""
    reason = cuda_condition() or ("" if torch.cuda.device_count() >= request.param else "there are too few GPUs")
    if reason:
        pytest.skip(reason)
    return request.param

"""The public module's ``testing``: comparison and timing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from .._fakes import arch_major
from ..testing import bench_kineto, calc_diff, count_bytes
from ._names import offer

__all__ = ["bench", "bench_kineto", "calc_diff", "count_bytes", "get_arch_major"]

offer("calc_diff")(calc_diff)


def get_arch_major() -> int:
    """Major compute capability of the current GPU; 9 where there is none."""
    return arch_major(torch.device("cuda"))


def bench(fn: Callable[[], Any], num_warmups: int = 5, num_tests: int = 10, high_precision: bool = False) -> float:
    """Median time of a call in seconds, between CUDA events; with ``high_precision`` each behind a spin, so that the
    host's own time does not show. :func:`bench_kineto` gives the kernels' own durations."""
    for _ in range(num_warmups):
        fn()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(num_tests)]
    for start, end in pairs:
        if high_precision:
            torch.cuda._sleep(1_000_000)
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

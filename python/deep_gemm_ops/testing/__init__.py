"""Comparison, case lists and timing, shared by the tests, the examples and ``python -m deep_gemm_ops.bench``."""

from . import bench, cases, numeric
from .bench import bench_kineto, count_bytes
from .numeric import Comparison, assert_close, assert_equal, calc_diff, compare, error_bar

__all__ = [
    "Comparison",
    "assert_close",
    "assert_equal",
    "bench",
    "bench_kineto",
    "calc_diff",
    "cases",
    "compare",
    "count_bytes",
    "error_bar",
    "numeric",
]

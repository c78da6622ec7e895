"""Comparison, case lists and timing, shared by the tests, the examples and ``python -m deep_gemm_ops.bench``."""

from .numeric import Comparison, assert_close, assert_equal, calc_diff, compare, error_bar

__all__ = ["Comparison", "assert_close", "assert_equal", "calc_diff", "compare", "error_bar"]

"""FP8 training layers on the ``deep_gemm`` operators: drop-in modules, their functions, and a converter."""

import torch

from .functional import fp8_grouped_linear, fp8_linear, fp8_swiglu_grouped_linear
from .modules import FP8Linear, FrozenExperts, FrozenFP8Linear, GroupedExperts, convert, freeze

__all__ = [
    "FP8Linear",
    "FrozenExperts",
    "FrozenFP8Linear",
    "GroupedExperts",
    "convert",
    "fp8_grouped_linear",
    "fp8_linear",
    "fp8_swiglu_grouped_linear",
    "freeze",
]

if torch.distributed.is_available():
    from . import _sharding  # noqa: F401  (importing it registers the rules)
    from .expert_parallel import ExpertParallel  # noqa: F401

    __all__.append("ExpertParallel")

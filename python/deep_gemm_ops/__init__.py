"""FP8 GEMM kernels for Hopper, compiled ahead of time, as PyTorch operators in ``torch.ops.deep_gemm``.

Importing the package registers the operators: CUDA from the shared library, CPU and fake implementations from Python.
It touches no GPU and no driver, so a process may fork afterwards.
"""

from . import _library

__version__ = "0.1.0"

_library.load()

from . import (  # noqa: E402, F401
    _cpu,
    _dense,
    _fakes,
    batched,
    bf16_gemm,
    fp8_fp4_gemm,
    fused_casts,
    grouped_fp8_fp4_gemm,
    grouped_gemm,
    knobs,
    mega_moe,
    mqa_logits,
    ops,
    prenorm_gemm,
    skip_head,
)
from .batched import *  # noqa: E402, F403
from .bf16_gemm import *  # noqa: E402, F403
from .fp8_fp4_gemm import *  # noqa: E402, F403
from .fused_casts import *  # noqa: E402, F403
from .grouped_fp8_fp4_gemm import *  # noqa: E402, F403
from .grouped_gemm import *  # noqa: E402, F403
from .knobs import *  # noqa: E402, F403
from .layout import get_tma_aligned_size, to_tma_aligned  # noqa: E402
from .mega_moe import *  # noqa: E402, F403
from .mqa_logits import *  # noqa: E402, F403
from .ops import *  # noqa: E402, F403
from .prenorm_gemm import *  # noqa: E402, F403
from .skip_head import *  # noqa: E402, F403

__all__ = [
    "__version__",
    "get_tma_aligned_size",
    "to_tma_aligned",
    *batched.__all__,
    *bf16_gemm.__all__,
    *fp8_fp4_gemm.__all__,
    *fused_casts.__all__,
    *grouped_fp8_fp4_gemm.__all__,
    *grouped_gemm.__all__,
    *knobs.__all__,
    *mega_moe.__all__,
    *mqa_logits.__all__,
    *ops.__all__,
    *prenorm_gemm.__all__,
    *skip_head.__all__,
]


def __getattr__(name: str) -> object:
    # Imported when first used: they cost time that a server does not want to spend.
    if name in ("compat", "export", "nn", "scaled_mm", "testing"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")

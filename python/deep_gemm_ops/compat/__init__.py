"""The public ``deep_gemm`` module's interface on these operators: code written for that package runs unmodified.

    import deep_gemm_ops.compat
    deep_gemm_ops.compat.install()
    import deep_gemm                                  # this module, its ``utils``, ``testing`` and ``jit``
    deep_gemm.fp8_gemm_nt((a, sfa), (b, sfb), d)

Names, argument orders and defaults are those of the current interface and of the first generation. A name exists only
where the operators behind it have a kernel for this machine, so ``hasattr`` and ``getattr(deep_gemm, name, None)`` tell
the truth. Which caller uses what: docs/compat.md.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import deep_gemm_ops

from . import _names, _products, _runtime, jit, testing, utils  # noqa: F401  (importing them fills the table of names)

#: The version of the public package whose interface this is.
__version__ = "2.6.1"

#: One kernel and all of its Python side live in the package itself, under the same names.
_MEGA = (
    "SymmBuffer",
    "bf16_mega_moe",
    "fp8_fp4_mega_moe",
    "fp8_mega_moe",
    "get_symm_buffer_for_mega_moe",
    "transform_weights_for_mega_moe",
)

_MODULES = {
    "deep_gemm": __name__,
    "deep_gemm.jit": jit.__name__,
    "deep_gemm.testing": testing.__name__,
    "deep_gemm.utils": utils.__name__,
    "deep_gemm.utils.layout": utils.layout.__name__,
    "deep_gemm.utils.math": utils.math.__name__,
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    if name in _MEGA and hasattr(deep_gemm_ops, name):
        return getattr(deep_gemm_ops, name)
    return _names.lookup(__name__, name)


def __dir__() -> list[str]:
    mega = [name for name in _MEGA if hasattr(deep_gemm_ops, name)]
    return sorted([*_names.present(), *mega, "install", "jit", "testing", "uninstall", "utils"])


def install() -> ModuleType:
    """Make ``import deep_gemm`` find this module, here and in whatever this process imports from now on.

    Returns:
        This module.

    Raises:
        RuntimeError: another ``deep_gemm`` has been imported already; its users hold references that cannot be changed.
    """
    there = sys.modules.get("deep_gemm")
    if there is not None and there.__name__ != __name__:
        where = getattr(there, "__file__", None)
        raise RuntimeError(f"install: another deep_gemm is imported already ({where}), expected none")
    for name, mine in _MODULES.items():
        sys.modules[name] = sys.modules[mine]
    return sys.modules[__name__]


def uninstall() -> None:
    """Undo :func:`install` for imports that follow."""
    for name, mine in _MODULES.items():
        if sys.modules.get(name) is sys.modules[mine]:
            del sys.modules[name]

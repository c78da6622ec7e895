"""Loads the shared library, which registers the ``deep_gemm`` operators and their CUDA implementations.

Where no library is installed (``DG_SKIP_CUDA_BUILD=1``) the same schemas are defined from ``schemas.inc``, so that the
CPU reference, the fakes and everything written against ``torch.ops.deep_gemm`` work without a compiler.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

NAMESPACE = "deep_gemm"
MIN_TORCH = (2, 11)

_PACKAGE = Path(__file__).resolve().parent
_LIBRARY = _PACKAGE / "libdeep_gemm_ops.so"


def library_path() -> Path | None:
    """Path of the shared library, None where the package was installed without it."""
    return _LIBRARY if _LIBRARY.is_file() else None


def schemas() -> list[str]:
    """Every operator schema, without its namespace, in the order of ``schemas.inc``."""
    for path in (_PACKAGE / "schemas.inc", _PACKAGE.parent.parent / "src" / "ops" / "schemas.inc"):
        if path.is_file():
            text = re.sub(r"//.*", "", path.read_text())
            calls = re.findall(r'DG_SCHEMA\(((?:\s*"[^"]*")+)\s*\)', text)
            return ["".join(re.findall(r'"([^"]*)"', call)) for call in calls]
    raise ImportError(f"deep_gemm_ops is incompletely installed: schemas.inc is missing in {_PACKAGE}")


def load() -> None:
    """Defines the operators, once per process.

    Raises ImportError, with one plain sentence, when PyTorch is too old, when another package owns the namespace or
    when the library does not load. None of this touches a GPU or a driver.
    """
    namespace = getattr(torch.ops, NAMESPACE)
    # Kept on torch.ops rather than in this module: what is registered outlives the module, reloads included.
    if getattr(namespace, "_deep_gemm_ops_owner", None) is not None:
        return

    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH:
        raise ImportError(
            f"deep_gemm_ops needs PyTorch {MIN_TORCH[0]}.{MIN_TORCH[1]} or later, this is PyTorch {torch.__version__}"
        )

    library = _claim_namespace()
    path = library_path()
    if path is None:
        for schema in schemas():
            library.define(schema)
        namespace._deep_gemm_ops_owner = library
        return

    library._destroy()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"deep_gemm_ops cannot load its library with PyTorch {torch.__version__}: {error.__cause__ or error}"
        ) from error
    namespace._deep_gemm_ops_owner = path


def _claim_namespace() -> torch.library.Library:
    """Registers the namespace from Python, which raises where the C++ registrar would end the process."""
    taken = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::"))
    detail = f"it defines {taken[0]}" + (f" and {len(taken) - 1} more" if len(taken) > 1 else "") if taken else ""
    try:
        library = torch.library.Library(NAMESPACE, "DEF")
    except RuntimeError as error:
        where = re.search(r"registered at (\S+?)[;,]", str(error))
        detail = ", ".join(filter(None, [detail, where and f"registered at {where.group(1)}"]))
    else:
        if not taken:
            return library
        library._destroy()
    raise ImportError(
        f"another package has already registered the operator namespace '{NAMESPACE}'"
        + (f" ({detail})" if detail else "")
        + ". Only one package in a process can own it: import deep_gemm_ops or the other one, not both."
    )

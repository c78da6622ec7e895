"""Runs pytest with the operators of src/ops in place of the CPU reference: ``python run.py LIBRARY ARGUMENTS...``.

The tests are those of the operators as they are; LIBRARY is what ``test_host_ops`` builds. The package is imported from
a copy without its shared library, which would register the same operators.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> int:
    library, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "deep_gemm_ops"
        shutil.copytree(
            ROOT / "python" / "deep_gemm_ops", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
        shutil.copy(ROOT / "src" / "ops" / "schemas.inc", package)
        torch.ops.load_library(library)
        torch.ops.deep_gemm._deep_gemm_ops_owner = library
        sys.path.insert(0, folder)
        from deep_gemm_ops import knobs

        set_knob = knobs._set

        def set_both(name: str, value: int) -> None:
            set_knob(name, value)
            if name == "mk_alignment":
                ctypes.CDLL(library).host_ops_set_alignment(value)

        knobs._set = set_both
        for op in ("fp8_gemm_nt", "k_grouped_bf16_gemm_tn_contiguous.out"):
            assert "host_ops.cpp" in torch._C._dispatch_dump(f"deep_gemm::{op}"), f"{op} is still the CPU reference"
        return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())

"""The C++ of the product operators without a GPU: tensors in host memory pass for CUDA's, and where a kernel would be
launched its problem is evaluated in plain C++ (host_ops/host_ops.cpp).

So argument checks and their texts, recipes, the preparation of operands and scales, strides of results and what is told
to the kernels are those that run on a GPU, under the operators' own tests.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from common import ROOT
from ptx_emulator.build import cache_dir

sys.path.insert(0, str(ROOT / "tools"))
import toolchain  # noqa: E402

FOLDER = ROOT / "test" / "host_ops"
SOURCES = [ROOT / "src" / "ops" / f"{name}.cpp" for name in ("product", "gemm", "einsum", "grouped_gemm", "mega_moe")]
DEPENDENCIES = [path for name in ("ops", "host") for path in sorted((ROOT / "src" / name).glob("*.*"))]


def _cuda_include() -> Path:
    try:
        return toolchain.cuda_home_of(toolchain.find_nvcc()) / "include"
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))


@functools.cache
def library() -> Path:
    """The operators' sources linked against host_ops.cpp, from the cache if nothing has changed."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    digest = hashlib.sha256(torch.__version__.encode())
    for path in [*DEPENDENCIES, *sorted(FOLDER.glob("*.*"))]:
        digest.update(path.name.encode() + path.read_bytes())
    done = cache_dir() / f"host-ops-{digest.hexdigest()[:16]}.so"
    if done.exists():
        return done
    torch_dir = Path(torch.__file__).parent
    common = ["-std=c++20", "-O1", "-fPIC", "-DTORCH_TARGET_VERSION=0x020B000000000000ULL", f"-I{ROOT / 'src'}"]
    common += ["-isystem", str(torch_dir / "include"), "-isystem", str(_cuda_include())]
    with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:
        running = []
        for source in [*SOURCES, FOLDER / "host_ops.cpp"]:
            options = ["-O3"] if source.parent == FOLDER else ["-include", str(FOLDER / "host_ops.h")]
            command = [compiler, *common, *options, "-c", str(source), "-o", f"{tmp}/{source.stem}.o"]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        for process in running:
            _, errors = process.communicate()
            assert process.returncode == 0, errors[-4000:]
        command = [compiler, "-shared", "-o", f"{tmp}/host_ops.so", *map(str, sorted(Path(tmp).glob("*.o")))]
        command += [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_dir / 'lib'}", "-Wl,-z,defs"]
        linked = subprocess.run(command, capture_output=True, text=True)
        assert linked.returncode == 0, linked.stderr[-4000:]
        os.replace(f"{tmp}/host_ops.so", done)
    return done


@pytest.mark.parametrize(
    ("files", "selection", "major"),
    [
        (["test_bad_input.py", "test_bad_input_grouped.py"], "not fake and not cuda", 9),
        (["test_gemm.py"], "not cuda and not tn and not tt and (fuzz or recipe or empty or accumulate or strides)", 9),
        (["test_grouped.py"], "not cuda and (fuzz or padding or hostile or skip or alignment or empty or casts)", 9),
        (["test_gemm.py"], "not cuda and not nn and not tt and (fuzz or scale_type or accumulate or strides)", 10),
        (["test_grouped.py"], "not cuda and (fuzz or padding or hostile or skip or alignment or empty or casts)", 10),
        (["test_fp8_fp4_gemm.py"], "not ragged and not fakes and not compiles", 10),
        (["test_fp8_fp4_gemm.py"], "not fakes and not compiles", 9),
        (["test_mega_moe.py"], "bad_input and not fake and not cuda", 9),
        (["test_mega_moe.py"], "kernels_of_sm100", 10),
    ],
    ids=[
        "bad input",
        "gemm",
        "grouped",
        "gemm on SM100",
        "grouped on SM100",
        "FP4 on SM100",
        "FP4 on SM90",
        "Mega MoE",
        "Mega MoE on SM100",
    ],
)
def test_the_operators_own_tests(files: list[str], selection: str, major: int) -> None:
    """`major`: of the compute capability of the GPU that there seems to be."""
    command = [sys.executable, str(FOLDER / "run.py"), str(library()), "-q", "-x", "-p", "no:cacheprovider"]
    command += [*(str(ROOT / "test" / name) for name in files), "-k", selection]
    environ = {**os.environ, "HOST_OPS_MAJOR": str(major)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "test", timeout=900, env=environ)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]

"""Builds the package. All of it but the shared library is described in pyproject.toml; the library is CMake's work.

Environment:
    DG_CUDA_ARCHS        90a, 100a, 90a;100a (default), or native: the architecture of the GPU found here
    MAX_JOBS             compilers run at once (default: all processors)
    DG_NUM_SHARDS        translation units per GEMM table (default: CMakeLists.txt)
    DG_SKIP_CUDA_BUILD   1: no shared library, the CPU reference alone
    DG_BUILD_DIR         where CMake works (default: build/cmake)
    CUDA_HOME, CXX       tools to use instead of those found (tools/toolchain.py)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import toolchain  # noqa: E402

LIBRARY = "libdeep_gemm_ops.so"


class BuildLibrary(build_ext):
    """Runs CMake and Ninja, then puts the library where setuptools expects an extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        # No suffix with a Python version in it: the library uses no Python.
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except toolchain.ToolchainError as error:
            sys.exit(f"deep_gemm_ops cannot be built: {error}")
        except subprocess.CalledProcessError as error:
            sys.exit(f"deep_gemm_ops cannot be built: {Path(error.cmd[0]).name} failed, see its output above")

    def _build(self, output: Path) -> None:
        tools = toolchain.find_all()
        archs = toolchain.requested_archs()
        jobs = toolchain.num_jobs()
        build_dir = Path(os.environ.get("DG_BUILD_DIR", ROOT / "build" / "cmake"))
        build_dir.mkdir(parents=True, exist_ok=True)

        configure = [
            *(str(tools.cmake), "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            *tools.cmake_args(),
        ]
        # CMake cannot exchange a compiler in a configured folder; anything else it works out itself.
        fingerprint = build_dir / "toolchain.txt"
        if not fingerprint.is_file() or fingerprint.read_text() != "\n".join(configure):
            fingerprint.write_text("\n".join(configure))
            configure.append("--fresh")
        configure.append(f"-DDG_CUDA_ARCHS={';'.join(archs)}")
        if os.environ.get("DG_NUM_SHARDS"):
            configure.append(f"-DDG_NUM_SHARDS={os.environ['DG_NUM_SHARDS']}")

        targets = ", ".join(f"sm_{arch}" for arch in archs)
        print(f"building {LIBRARY} for {targets}, {jobs} jobs, {tools.nvcc}", flush=True)
        subprocess.run(configure, check=True)
        subprocess.run([str(tools.cmake), "--build", str(build_dir), "--parallel", str(jobs)], check=True)

        output.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old library mapped keeps it.
        partial = output.with_suffix(".partial")
        shutil.copy2(build_dir / LIBRARY, partial)
        partial.replace(output)


class BuildPython(build_py):
    """Adds the schemas, which Python reads where no library is installed."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "deep_gemm_ops"
            target.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / "src" / "ops" / "schemas.inc"), str(target / "schemas.inc"))


class Wheel(bdist_wheel):
    """One wheel for every Python: the tag names the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if toolchain.skip_cuda_build() else "linux_x86_64")


setup(
    ext_modules=[] if toolchain.skip_cuda_build() else [Extension("deep_gemm_ops.libdeep_gemm_ops", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPython, "bdist_wheel": Wheel},
)

"""Finds what a build needs: nvcc, PyTorch, CMake, Ninja and a C++ compiler.

Standard library only, because it also runs before anything is installed (``tools/make_env.py``, ``tools/backend.py``).
Every function raises ``ToolchainError`` with one message that names what is missing and the command that installs it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("90a", "100a")
MIN_NVCC = (12, 9)
MIN_TORCH = (2, 11)
MIN_CMAKE = (3, 26)


class ToolchainError(RuntimeError):
    """Something the build needs is missing; the message says what to install."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """Everything CMake is told about the machine."""

    nvcc: Path
    cuda_home: Path
    torch_dir: Path
    cmake: Path
    ninja: Path
    cxx: Path

    def cmake_args(self) -> list[str]:
        return [
            f"-DCMAKE_CUDA_COMPILER={self.nvcc}",
            f"-DCMAKE_CXX_COMPILER={self.cxx}",
            f"-DCMAKE_CUDA_HOST_COMPILER={self.cxx}",
            f"-DCMAKE_MAKE_PROGRAM={self.ninja}",
            f"-DDG_CUDA_HOME={self.cuda_home}",
            f"-DDG_TORCH_DIR={self.torch_dir}",
        ]


def site_roots() -> list[Path]:
    """Folders where pip puts packages, for this interpreter, build-isolation overlays included."""
    names = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    roots = []
    for name in names:
        path = Path(name) if name else None
        if path is not None and path.is_dir() and path not in roots:
            roots.append(path)
    return roots


def requested_archs(environ: Mapping[str, str] = os.environ) -> list[str]:
    """``DG_CUDA_ARCHS``: ``90a``, ``100a``, ``90a;100a`` (the default) or ``native``."""
    value = environ.get("DG_CUDA_ARCHS", "").strip() or ";".join(ARCHS)
    if value == "native":
        return [native_arch()]
    archs = [arch for arch in re.split(r"[;, ]+", value) if arch]
    unknown = [arch for arch in archs if arch not in ARCHS]
    if unknown or not archs:
        raise ToolchainError(f"DG_CUDA_ARCHS is {value!r}, expected 90a, 100a, 90a;100a or native")
    return [arch for arch in ARCHS if arch in archs]


def native_arch() -> str:
    """The architecture of the first GPU here, 90a where there is none that we have kernels for."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "90a"
    return "100a" if out.split()[:1] == ["10.0"] else "90a"


def skip_cuda_build(environ: Mapping[str, str] = os.environ) -> bool:
    """``DG_SKIP_CUDA_BUILD=1`` asks for the CPU reference alone."""
    return environ.get("DG_SKIP_CUDA_BUILD", "0") not in ("", "0")


def num_jobs(environ: Mapping[str, str] = os.environ) -> int:
    """``MAX_JOBS``, else the number of processors this process may use."""
    value = environ.get("MAX_JOBS", "").strip()
    if not value:
        return len(os.sched_getaffinity(0))
    if not value.isdigit() or int(value) < 1:
        raise ToolchainError(f"MAX_JOBS is {value!r}, expected a whole number of at least 1")
    return int(value)


def find_nvcc(environ: Mapping[str, str] = os.environ, roots: Sequence[Path] | None = None) -> Path:
    """nvcc from ``CUDA_HOME``, else from ``PATH``, else from the ``nvidia-cuda-nvcc`` wheel."""
    home = environ.get("CUDA_HOME", "")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.is_file():
            raise ToolchainError(
                f"CUDA_HOME is {home!r}, but there is no {nvcc}. Point CUDA_HOME at a CUDA toolkit of version "
                f"{_dotted(MIN_NVCC)} or later, or unset it to use nvcc from PATH or from PyPI."
            )
        return nvcc
    found = shutil.which("nvcc", path=environ.get("PATH", ""))
    if found:
        return Path(found)
    for root in site_roots() if roots is None else roots:
        for nvcc in sorted(root.glob("nvidia/cu1[3-9]/bin/nvcc")):
            return nvcc
    raise ToolchainError(
        "no CUDA compiler: nvcc is neither in CUDA_HOME nor on PATH nor installed from PyPI. Install it with\n"
        "    pip install -r requirements-cuda.txt\n"
        "or build the CPU reference alone with DG_SKIP_CUDA_BUILD=1."
    )


def cuda_home_of(nvcc: Path) -> Path:
    """The toolkit nvcc itself uses; asking it also sees through wrappers and links."""
    try:
        result = subprocess.run(
            [str(nvcc), "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise ToolchainError(f"{nvcc} does not run: {detail.strip()}") from None
    match = re.search(r"^#\$ TOP=(.*)$", result.stderr, re.MULTILINE)
    home = Path(match.group(1)).resolve() if match else nvcc.resolve().parent.parent
    needed = {
        "include/cuda_runtime.h": "nvidia-cuda-runtime",
        "include/crt/host_config.h": "nvidia-cuda-crt",
        "nvvm/bin/cicc": "nvidia-nvvm",
    }
    for name, package in needed.items():
        if not (home / name).is_file():
            raise ToolchainError(
                f"the CUDA toolkit in {home} is incomplete: {name} is missing (package {package}). Install it with\n"
                "    pip install -r requirements-cuda.txt"
            )
    return home


def check_nvcc_version(nvcc: Path) -> None:
    out = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", out)
    if match and (int(match.group(1)), int(match.group(2))) < MIN_NVCC:
        raise ToolchainError(
            f"{nvcc} is version {match.group(1)}.{match.group(2)}, expected {_dotted(MIN_NVCC)} or later. Install a "
            "newer one with\n    pip install -r requirements-cuda.txt\nand take the old one off PATH and CUDA_HOME."
        )


def find_torch(roots: Sequence[Path] | None = None) -> Path:
    """The torch package's folder, found without importing it (an import costs seconds)."""
    for root in site_roots() if roots is None else roots:
        torch_dir = root / "torch"
        if (torch_dir / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            found = [dist.version for dist in metadata.distributions(name="torch", path=[str(root)])]
            if found and _parse(found[0]) < MIN_TORCH:
                raise ToolchainError(
                    f"PyTorch in {torch_dir} is version {found[0]}, expected {_dotted(MIN_TORCH)} or later. "
                    f"Install it with\n    pip install '{_pinned('torch')}'"
                )
            return torch_dir
    raise ToolchainError(
        f"no PyTorch: this interpreter ({sys.executable}) has none. Install it with\n    pip install "
        f"'{_pinned('torch')}'\nand, if you called pip, pass --no-build-isolation."
    )


def find_program(
    name: str, environ: Mapping[str, str] = os.environ, roots: Sequence[Path] | None = None
) -> Path:
    """cmake or ninja, from their PyPI packages where installed (a known version), else from ``PATH``."""
    for root in site_roots() if roots is None else roots:
        if not (root / name / "__init__.py").is_file():
            continue
        for candidate in (root / name / "data" / "bin" / name, root.parent.parent.parent / "bin" / name):
            if candidate.is_file():
                return candidate
    found = shutil.which(name, path=environ.get("PATH", ""))
    if found:
        return Path(found)
    raise ToolchainError(f"no {name}. Install it with\n    pip install '{_pinned(name)}'")


def check_cmake_version(cmake: Path) -> None:
    out = subprocess.run([str(cmake), "--version"], capture_output=True, text=True, check=True).stdout
    if _parse(out) < MIN_CMAKE:
        raise ToolchainError(
            f"{cmake} is version {_dotted(_parse(out))}, expected {_dotted(MIN_CMAKE)} or later. Install a newer one "
            f"with\n    pip install '{_pinned('cmake')}'"
        )


def find_cxx(environ: Mapping[str, str] = os.environ) -> Path:
    """The C++ compiler, also nvcc's host compiler: ``CXX``, else c++, g++ or clang++."""
    wanted = environ.get("CXX", "")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        found = shutil.which(name, path=environ.get("PATH", ""))
        if found:
            return Path(found)
    raise ToolchainError(
        (f"CXX is {wanted!r}, but there is no such program. " if wanted else "no C++ compiler. ")
        + "Install one with your system's package manager, for example\n    apt-get install g++"
    )


def find_all(environ: Mapping[str, str] = os.environ) -> Toolchain:
    nvcc = find_nvcc(environ)
    check_nvcc_version(nvcc)
    cmake = find_program("cmake", environ)
    check_cmake_version(cmake)
    return Toolchain(
        nvcc=nvcc,
        cuda_home=cuda_home_of(nvcc),
        torch_dir=find_torch(),
        cmake=cmake,
        ninja=find_program("ninja", environ),
        cxx=find_cxx(environ),
    )


def requirements(name: str) -> list[str]:
    """The lines of requirements-NAME.txt, comments left out."""
    lines = (ROOT / f"requirements-{name}.txt").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def _pinned(package: str) -> str:
    for line in [*requirements("build"), *requirements("torch")]:
        if line.startswith(f"{package}=="):
            return line
    return package


def _parse(version: str) -> tuple[int, int]:
    numbers = re.findall(r"\d+", version)
    return int(numbers[0]), int(numbers[1])


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


if __name__ == "__main__":
    # The folder of nvcc, for a shell's PATH; nothing where there is none.
    try:
        print(find_nvcc().parent)
    except ToolchainError:
        print()

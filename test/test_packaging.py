"""The wheel and the shared library: what is in them, what they need, and what importing the package does."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "python" / "deep_gemm_ops" / "libdeep_gemm_ops.so"
BUILD_DIR = Path(os.environ.get("DG_BUILD_DIR", ROOT / "build" / "cmake"))

sys.path.insert(0, str(ROOT / "tools"))
import toolchain  # noqa: E402

needs_library = pytest.mark.skipif(not LIBRARY.is_file(), reason="built with DG_SKIP_CUDA_BUILD=1: no shared library")


def run_python(code: str, *, path: Path = ROOT / "python", **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that imports the package from ``path``."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", **environ},
    )


def printed(code: str, **kwargs: object) -> str:
    result = run_python(code, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def run_setup(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environ},
    )


def build_wheel(folder: Path, **environ: str) -> Path:
    scratch = folder / "scratch"
    dirs = ["-b", str(scratch), "bdist_wheel", "-b", str(scratch / "wheel"), "-d", str(folder)]
    result = run_setup("build", *dirs, **environ)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = BUILD_DIR / "CMakeCache.txt"
    if not LIBRARY.is_file() or not cache.is_file():
        pytest.skip("no built library to put into a wheel")
    # The architectures that the folder is configured for: the wheel then takes the library that lies there.
    archs = re.search(r"^DG_CUDA_ARCHS:STRING=(.*)$", cache.read_text(), re.MULTILINE)
    assert archs is not None
    return build_wheel(tmp_path_factory.mktemp("wheel"), DG_CUDA_ARCHS=archs.group(1), DG_SKIP_CUDA_BUILD="0")


@pytest.fixture(scope="module")
def reference_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("reference_wheel"), DG_SKIP_CUDA_BUILD="1")


def unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


# ----------------------------------------------------------------------------------------------------------- the wheel


def test_wheel_serves_every_python(wheel: Path) -> None:
    assert wheel.name == "deep_gemm_ops-0.1.0-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read("deep_gemm_ops-0.1.0.dist-info/WHEEL").decode()
    assert "Tag: py3-none-linux_x86_64\n" in metadata
    assert "Root-Is-Purelib: false\n" in metadata


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 60e6


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = names_in(wheel)
    assert {name.split("/")[0] for name in names} == {"deep_gemm_ops", "deep_gemm_ops-0.1.0.dist-info"}
    assert [name for name in names if name.endswith(".so")] == ["deep_gemm_ops/libdeep_gemm_ops.so"]
    assert [name for name in names if re.search(r"emulator|test_|\.cuh?$|\.cpp$|\.o$", name)] == []
    modules = {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python").rglob("*.py")}
    assert modules <= set(names)
    assert "deep_gemm_ops/schemas.inc" in names
    assert "deep_gemm_ops-0.1.0.dist-info/licenses/LICENSE" in names


def test_wheel_works_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    folder = unpack(wheel, tmp_path)
    out = printed(
        "import deep_gemm_ops, torch\n"
        "print(deep_gemm_ops._library.library_path())\n"
        "print(torch.ops.deep_gemm.fp8_gemm_nt.overloads())",
        path=folder,
    )
    assert out.splitlines() == [str(folder / "deep_gemm_ops" / "libdeep_gemm_ops.so"), "['default', 'out']"]


def test_reference_wheel_has_no_library_and_computes(reference_wheel: Path, tmp_path: Path) -> None:
    assert reference_wheel.name == "deep_gemm_ops-0.1.0-py3-none-any.whl"
    assert [name for name in names_in(reference_wheel) if name.endswith(".so")] == []
    out = printed(
        "import deep_gemm_ops, torch\n"
        "print(deep_gemm_ops._library.library_path())\n"
        "x = torch.ones(3, 256)\n"
        "a, sfa = torch.ops.deep_gemm.per_token_cast_to_fp8(x)\n"
        "b, sfb = torch.ops.deep_gemm.per_block_cast_to_fp8(x)\n"
        "print(torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb).tolist())",
        path=unpack(reference_wheel, tmp_path),
    )
    assert out.splitlines() == ["None", str([[256.0] * 3] * 3)]


@needs_library
def test_schemas_are_the_same_with_and_without_the_library(reference_wheel: Path, tmp_path: Path) -> None:
    code = (
        "import deep_gemm_ops, torch\n"
        "names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith('deep_gemm::'))\n"
        "for name in names: print(torch._C._dispatch_dump(name).splitlines()[1])"
    )
    compiled = printed(code)
    assert "fp8_gemm_nt" in compiled
    assert printed(code, path=unpack(reference_wheel, tmp_path)) == compiled


# -------------------------------------------------------------------------------------------------- the shared library


def dynamic_symbols(kind: str) -> list[tuple[str, str]]:
    """(type letter, name with version) of the library's dynamic symbols."""
    out = subprocess.check_output(["nm", "-D", f"--{kind}-only", str(LIBRARY)], text=True)
    return [(fields[-2], fields[-1]) for fields in (line.split() for line in out.splitlines())]


@needs_library
def test_only_dg_symbols_are_exported() -> None:
    names = [name for _, name in dynamic_symbols("defined")]
    assert "dg_instances" in names
    assert [name for name in names if not name.startswith("dg_")] == []


@needs_library
def test_undefined_symbols_are_the_system_s_and_pytorch_s_stable_abi() -> None:
    system = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
    stable = re.compile(r"^(aoti_)?torch_\w+$")
    strong = [name for kind, name in dynamic_symbols("undefined") if kind == "U"]
    assert [name for name in strong if not system.search(name) and not stable.match(name)] == []
    # What only a CUDA build of PyTorch has must be weak, else no CPU build could load the library.
    assert [name for name in strong if re.search("cuda_(guard|stream|caching|blas)|current_cuda", name)] == []


@needs_library
def test_every_pytorch_symbol_it_needs_is_in_this_pytorch() -> None:
    import torch

    loaded = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    strong = [name for kind, name in dynamic_symbols("undefined") if kind == "U" and "@" not in name]
    assert strong != []
    assert [name for name in strong if not hasattr(loaded, name)] == []


@needs_library
def test_it_needs_neither_python_nor_a_driver_nor_cuda_libraries() -> None:
    out = subprocess.check_output(["readelf", "-d", str(LIBRARY)], text=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", out))
    system = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
    system |= {"libdl.so.2", "librt.so.1", "libpthread.so.0"}  # separate libraries before glibc 2.34
    assert needed - system == {"libtorch.so", "libtorch_cpu.so"}
    assert re.findall(r"\((?:RPATH|RUNPATH)\)", out) == []


@needs_library
def test_no_path_of_the_build_machine_is_in_the_library() -> None:
    assert str(ROOT).encode() not in LIBRARY.read_bytes()


# ----------------------------------------------------------------------------------------------------------- importing


def test_import_adds_little_to_torch() -> None:
    code = "import time, torch\nstart = time.perf_counter()\nimport deep_gemm_ops\nprint(time.perf_counter() - start)"
    # The best of five: other processes share the machine.
    assert min(float(printed(code)) for _ in range(5)) < 0.3


def test_import_initialises_no_cuda_and_survives_a_fork() -> None:
    code = """
import os, torch, deep_gemm_ops
assert not torch.cuda.is_initialized()
opened = [line for line in open("/proc/self/maps") if "/dev/nvidia" in line]
assert opened == [], opened
x = torch.ones(2, 128)
child = os.fork()
if child == 0:
    values, _ = torch.ops.deep_gemm.per_token_cast_to_fp8(x)
    if torch.cuda.is_available():
        torch.ones(1, device="cuda")
    os._exit(0 if values.shape == (2, 128) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("ok")
"""
    assert printed(code, OMP_NUM_THREADS="1") == "ok"


@needs_library
def test_import_without_a_visible_gpu_or_toolkit() -> None:
    code = "import deep_gemm_ops, torch; print(torch.ops.deep_gemm.fp8_gemm_nt.overloads())"
    out = printed(code, CUDA_VISIBLE_DEVICES="", CUDA_HOME="/nonexistent", PATH="/nonexistent")
    assert out == "['default', 'out']"


@needs_library
def test_the_driver_is_not_opened_by_the_library() -> None:
    code = """
import torch
def drivers(): return sorted({line.split()[-1] for line in open("/proc/self/maps") if "libcuda.so" in line})
before = drivers()
import deep_gemm_ops
assert drivers() == before, drivers()
"""
    assert printed(code) == ""


def test_reimport_finds_the_operators_registered() -> None:
    code = """
import sys, warnings
import deep_gemm_ops._library
for name in [n for n in sys.modules if n.startswith("deep_gemm_ops")]: del sys.modules[name]
import deep_gemm_ops._library
print("ok")
"""
    assert printed(code) == "ok"


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), False])
def test_a_taken_namespace_is_one_plain_error(library: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = ROOT / "python"
    if not library:
        path = unpack(request.getfixturevalue("reference_wheel"), tmp_path)

    def error(kind: str, *schemas: str) -> str:
        other = f"import torch\nother = torch.library.Library('deep_gemm', '{kind}')\n"
        other += "".join(f"other.define('{schema}')\n" for schema in schemas)
        result = run_python(other + "import deep_gemm_ops", path=path)
        assert result.returncode == 1, result.stdout + result.stderr
        return result.stderr.splitlines()[-1]

    assert_expected_inline(
        error("DEF"),
        """ImportError: another package has already registered the operator namespace 'deep_gemm' (registered at <string>:2). Only one package in a process can own it: import deep_gemm_ops or the other one, not both.""",  # noqa: E501
    )
    assert_expected_inline(
        error("FRAGMENT", "f(Tensor x) -> Tensor", "g(Tensor x) -> Tensor"),
        """ImportError: another package has already registered the operator namespace 'deep_gemm' (it defines deep_gemm::f and 1 more). Only one package in a process can own it: import deep_gemm_ops or the other one, not both.""",  # noqa: E501
    )


def test_an_old_pytorch_is_one_plain_error() -> None:
    result = run_python("import torch\ntorch.__version__ = '2.10.0+cu128'\nimport deep_gemm_ops")
    assert_expected_inline(
        result.stderr.splitlines()[-1],
        """ImportError: deep_gemm_ops needs PyTorch 2.11 or later, this is PyTorch 2.10.0+cu128""",
    )


# -------------------------------------------------------------------------------------------------- tools of the build


def tool_error(function: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(toolchain.ToolchainError) as info:
        function(*args, **kwargs)
    return str(info.value)


def test_a_missing_tool_says_what_to_install() -> None:
    assert_expected_inline(
        tool_error(toolchain.find_nvcc, {}, roots=[]),
        """\
no CUDA compiler: nvcc is neither in CUDA_HOME nor on PATH nor installed from PyPI. Install it with
    pip install -r requirements-cuda.txt
or build the CPU reference alone with DG_SKIP_CUDA_BUILD=1.""",
    )
    assert_expected_inline(
        tool_error(toolchain.find_nvcc, {"CUDA_HOME": "/nonexistent"}, roots=[]),
        """CUDA_HOME is '/nonexistent', but there is no /nonexistent/bin/nvcc. Point CUDA_HOME at a CUDA toolkit of version 12.9 or later, or unset it to use nvcc from PATH or from PyPI.""",  # noqa: E501
    )
    assert_expected_inline(
        tool_error(toolchain.find_torch, roots=[]).replace(sys.executable, "PYTHON"),
        """\
no PyTorch: this interpreter (PYTHON) has none. Install it with
    pip install 'torch==2.13.0'
and, if you called pip, pass --no-build-isolation.""",
    )
    assert_expected_inline(
        tool_error(toolchain.find_cxx, {"PATH": "/nonexistent"}),
        """\
no C++ compiler. Install one with your system's package manager, for example
    apt-get install g++""",
    )
    assert_expected_inline(
        tool_error(toolchain.find_program, "ninja", roots=[], environ={"PATH": "/nonexistent"}),
        """\
no ninja. Install it with
    pip install 'ninja==1.13.2'""",
    )


def test_an_incomplete_toolkit_says_which_package_is_missing(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert_expected_inline(
        tool_error(toolchain.cuda_home_of, nvcc).replace(str(tmp_path.resolve()), "HOME"),
        """\
the CUDA toolkit in HOME is incomplete: include/cuda_runtime.h is missing (package nvidia-cuda-runtime). Install it with
    pip install -r requirements-cuda.txt""",
    )


def test_switches_are_checked() -> None:
    assert toolchain.requested_archs({}) == ["90a", "100a"]
    assert toolchain.requested_archs({"DG_CUDA_ARCHS": "100a;90a"}) == ["90a", "100a"]
    assert toolchain.requested_archs({"DG_CUDA_ARCHS": "100a"}) == ["100a"]
    assert_expected_inline(
        tool_error(toolchain.requested_archs, {"DG_CUDA_ARCHS": "90a;80"}),
        """DG_CUDA_ARCHS is '90a;80', expected 90a, 100a, 90a;100a or native""",
    )
    assert toolchain.num_jobs({"MAX_JOBS": "3"}) == 3
    assert_expected_inline(
        tool_error(toolchain.num_jobs, {"MAX_JOBS": "many"}),
        """MAX_JOBS is 'many', expected a whole number of at least 1""",
    )


def test_setup_ends_with_the_message_and_no_traceback() -> None:
    result = run_setup("build_ext", CUDA_HOME="/nonexistent", DG_SKIP_CUDA_BUILD="0")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("deep_gemm_ops cannot be built: CUDA_HOME is '/nonexistent'")


def test_requirements_are_pinned() -> None:
    for path in ROOT.glob("requirements-*.txt"):
        for line in toolchain.requirements(path.stem.removeprefix("requirements-")):
            assert re.match(r"^[\w-]+==[\d.]+(; python_version [<>=]+ \"[\d.]+\")?$", line), f"{path.name}: {line}"

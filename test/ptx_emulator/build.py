"""Building the emulator's shared library on first use, and compiling CUDA to PTX."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra"]


def cache_dir() -> Path:
    """Where built files go: $PTX_EMULATOR_CACHE, else a directory of this user under the system's temporary one."""
    default = Path(tempfile.gettempdir()) / f"ptx_emulator-{os.getuid()}"
    path = Path(os.environ.get("PTX_EMULATOR_CACHE", default))
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock against other processes; the operating system frees it if this one dies."""
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _digest(*parts: bytes) -> str:
    h = hashlib.sha256()
    for p in parts:
        h.update(len(p).to_bytes(8, "little") + p)
    return h.hexdigest()[:16]


def library_path() -> Path:
    """Path of the shared library, built if the sources have changed; $PTX_EMULATOR_LIB overrides."""
    if env := os.environ.get("PTX_EMULATOR_LIB"):
        return Path(env)
    sources = sorted((ROOT / "src").glob("*.cpp"))
    headers = [p.read_bytes() for p in sorted((ROOT / "src").glob("*.hpp"))]
    cxx = os.environ.get("CXX", "g++")
    common = [cxx.encode(), " ".join(FLAGS).encode(), *headers]
    cache = cache_dir()
    lib = cache / f"libptx_emulator-{_digest(*common, *[p.read_bytes() for p in sources])}.so"
    if not lib.exists():
        with _locked(cache / "build.lock"):
            if not lib.exists():
                _build_once(cxx, sources, common, lib)
    return lib


_failed: dict[Path, Exception] = {}


def _build_once(cxx: str, sources: Sequence[Path], common: Sequence[bytes], lib: Path) -> None:
    """A build that failed is not tried again by every test of the process."""
    if lib in _failed:
        raise _failed[lib]
    try:
        _build(cxx, sources, common, lib)
    except Exception as e:
        _failed[lib] = e
        raise


def _build(cxx: str, sources: Sequence[Path], common: Sequence[bytes], lib: Path) -> None:
    def compile_one(src: Path) -> Path:
        obj = lib.parent / f"{src.stem}-{_digest(src.read_bytes(), *common)}.o"
        if not obj.exists():
            # Every PTX operation rounds on its own; only the tensor-core sums, which are taken in double, may fuse.
            contract = "fast" if src.name == "tensorcore.cpp" else "off"
            tmp = obj.with_suffix(".tmp")
            subprocess.run([cxx, *FLAGS, f"-ffp-contract={contract}", "-c", str(src), "-o", str(tmp)], check=True)
            tmp.replace(obj)
        return obj

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        # The largest first, so that the last one to finish is a small one.
        order = sorted(sources, key=lambda p: -p.stat().st_size)
        objs = list(pool.map(compile_one, order))
    tmp = lib.with_suffix(".tmp")
    subprocess.run([cxx, "-shared", "-o", str(tmp), *map(str, objs)], check=True)
    tmp.replace(lib)
    _remove_stale(lib.parent, {*objs, lib})


def _remove_stale(cache: Path, keep: set[Path], count: int = 1000) -> None:
    """Bounds the cache: of the built files not in `keep`, only the newest `count` stay."""
    files = [p for p in cache.iterdir() if p.suffix in (".o", ".so", ".ptx", ".cubin") and p not in keep]
    for p in sorted(files, key=lambda p: p.stat().st_mtime)[:-count]:
        p.unlink(missing_ok=True)


def nvcc_path() -> str | None:
    """nvcc from PATH, CUDA_HOME or CUDA_PATH; None when there is none."""
    if found := shutil.which("nvcc"):
        return found
    for var in ("CUDA_HOME", "CUDA_PATH"):
        if (root := os.environ.get(var)) and (Path(root) / "bin" / "nvcc").exists():
            return str(Path(root) / "bin" / "nvcc")
    return None


def compile_cuda(source: str | Path, arch: str, include: Sequence[str | Path] = (), options: Sequence[str] = ()) -> str:
    """PTX text of a CUDA source (a path, or the text itself) for an architecture such as '90a'."""
    nvcc = nvcc_path()
    if nvcc is None:
        raise FileNotFoundError("nvcc not found on PATH or under CUDA_HOME")
    with tempfile.TemporaryDirectory(prefix="ptx_emulator-") as tmp:
        src = Path(source) if "\n" not in str(source) else None
        if src is None:
            src = Path(tmp) / "kernel.cu"
            src.write_text(str(source))
        out = Path(tmp) / "kernel.ptx"
        target = f"-gencode=arch=compute_{arch},code=compute_{arch}"
        cmd = [nvcc, "-std=c++20", "-O3", target, "-ptx", *[f"-I{i}" for i in include], *options, str(src), "-o", out]
        r = subprocess.run(cmd, capture_output=True, text=True)
        if r.returncode:
            raise RuntimeError(f"nvcc failed:\n{r.stderr[-4000:]}")
        return out.read_text()

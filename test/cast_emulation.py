"""Runs the launch functions of src/host/cast.h on the PTX emulator.

The kernels and their host code are compiled as they are, but linked against a CUDA runtime of a few lines that hands
every launch to a callback. So what is tested includes the choice of kernel, its grid and its parameters.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import ptx_emulator
from ptx_emulator.build import cache_dir

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src" / "cast").glob("*.cu"))
HEADERS = [
    *sorted((ROOT / "src" / "cast").glob("*.cuh")),
    *(ROOT / "src" / "host" / name for name in ("cast.h", "gemm_problem.h", "gemm_row.h")),
    ROOT / "src" / "device" / "fp4.cuh",
]

RUNTIME = r"""
#include <cuda_runtime_api.h>
#include <cstring>
#include <map>
#include "host/cast.h"

using namespace deep_gemm::cast;

namespace {
std::map<const void*, const char*>& kernels() {
    static std::map<const void*, const char*> names;
    return names;
}
int (*callback)(const char* kernel, unsigned grid, unsigned block, const void* params, int pdl);
}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    kernels()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, struct CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    *kernel = (cudaKernel_t)host;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** args) {
    if (config->gridDim.y != 1 || config->gridDim.z != 1 || config->dynamicSmemBytes != 0) return cudaErrorUnknown;
    return (cudaError_t)callback(kernels().at(host), config->gridDim.x, config->blockDim.x, args[0], config->numAttrs);
}
void set_callback(int (*f)(const char*, unsigned, unsigned, const void*, int)) { callback = f; }
unsigned long sizes[12] = {sizeof(CastProblem), sizeof(TransposeProblem), sizeof(ScaleLayoutProblem),
                          sizeof(GroupedPackProblem), sizeof(SwigluProblem), sizeof(TransposedCastProblem),
                          sizeof(KGroups), sizeof(KGroupedTransposeProblem), sizeof(ExpandFp4Problem),
                           sizeof(FoldFp4Problem), sizeof(Bf16TokensProblem),
                           sizeof(SwigluBackwardProblem)};
int per_token_cast(const CastProblem& p, int pdl) { return launch_per_token_cast(p, nullptr, pdl); }
int per_channel_cast(const CastProblem& p, int pdl) { return launch_per_channel_cast(p, nullptr, pdl); }
int per_block_cast(const CastProblem& p, int pdl) { return launch_per_block_cast(p, nullptr, pdl); }
int per_token_cast_fp4(const CastProblem& p, int pdl) { return launch_per_token_cast_fp4(p, nullptr, pdl); }
int swiglu_cast(const SwigluProblem& p, int pdl) { return launch_swiglu_cast(p, nullptr, pdl); }
int swiglu_backward(const SwigluBackwardProblem& p, int pdl) { return launch_swiglu_backward(p, nullptr, pdl); }
int per_token_cast_with_transpose(const TransposedCastProblem& p, int pdl) {
    return launch_per_token_cast_with_transpose(p, nullptr, pdl);
}
int per_block_cast_with_transpose(const TransposedCastProblem& p, int pdl) {
    return launch_per_block_cast_with_transpose(p, nullptr, pdl);
}
int per_channel_cast_transposed(const TransposedCastProblem& p, int pdl) {
    return launch_per_channel_cast_transposed(p, nullptr, pdl);
}
int per_block_cast_transposed(const TransposedCastProblem& p, int pdl) {
    return launch_per_block_cast_transposed(p, nullptr, pdl);
}
struct GroupedProblem { TransposedCastProblem problem; KGroups groups; };
int k_grouped_cast(const GroupedProblem& p, int pdl) {
    return launch_k_grouped_per_channel_cast(p.problem.cast, p.groups, nullptr, pdl);
}
int k_grouped_cast_k_major(const GroupedProblem& p, int pdl) {
    return launch_k_grouped_cast_k_major(p.problem, p.groups, nullptr, pdl);
}
struct GroupedTransposeProblem { KGroupedTransposeProblem problem; KGroups groups; };
int k_grouped_transpose(const GroupedTransposeProblem& p, int pdl) {
    return launch_k_grouped_transpose_fp8(p.problem, p.groups, nullptr, pdl);
}
int transpose_fp8(const TransposeProblem& p, int pdl) { return launch_transpose_fp8(p, nullptr, pdl); }
int scale_layout(const ScaleLayoutProblem& p, int pdl) { return launch_scale_layout(p, nullptr, pdl); }
int expand_fp4(const ExpandFp4Problem& p, int pdl) { return launch_expand_fp4(p, nullptr, pdl); }
int bf16_tokens(const Bf16TokensProblem& p, int pdl) { return launch_bf16_tokens(p, nullptr, pdl); }
int fold_fp4(const FoldFp4Problem& p, int pdl) { return launch_fold_fp4(p, nullptr, pdl); }
int k_grouped_pack(const GroupedPackProblem& p, int pdl) { return launch_k_grouped_pack_ue8m0(p, nullptr, pdl); }
}
"""

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class CastProblem(ctypes.Structure):
    _fields_ = [("x", _P), ("x_type", _I), ("rows", _L), ("cols", _L), ("x_stride", _L), ("out", _P)] + [
        ("out_stride", _L), ("sf", _P), ("sf_stride", _L), ("gran_k", _I), ("sf_format", _I)] + [
        ("num_sms", _I)]  # fmt: skip


class TransposeProblem(ctypes.Structure):
    _fields_ = [("x", _P), ("x_stride", _L), ("x_batch_stride", _L), ("out", _P), ("out_stride", _L)] + [
        ("out_batch_stride", _L), ("rows", _L), ("cols", _L), ("batch", _L)]  # fmt: skip


class ScaleLayoutProblem(ctypes.Structure):
    _fields_ = [("src", _P), ("src_type", _I), ("src_batch_stride", _L), ("src_mn_stride", _L)] + [
        ("src_k_stride", _L), ("dst", _P), ("dst_type", _I), ("dst_batch_stride", _L), ("dst_k_stride", _L)] + [
        ("batch", _L), ("mn", _L), ("k_sf", _L), ("mn_repeat", _I), ("k_repeat", _I), ("row_counts", _P)] + [
        ("round_up", ctypes.c_bool)]  # fmt: skip


class GroupedPackProblem(ctypes.Structure):
    _fields_ = [("src", _P), ("src_k_stride", _L), ("src_mn_stride", _L), ("sf_rows", _L), ("mn", _L)] + [
        ("ks", _P), ("ks_stride", _L), ("num_groups", _L), ("gran_k", _I), ("dst", _P), ("dst_k_stride", _L)] + [
        ("dst_rows", _L)]  # fmt: skip


class SwigluProblem(ctypes.Structure):
    _fields_ = [("cast", CastProblem), ("topk_weights", _P), ("weight_stride", _L), ("clamped", ctypes.c_bool)] + [
        ("clamp", ctypes.c_float)]  # fmt: skip


class SwigluBackwardProblem(ctypes.Structure):
    _fields_ = [("x", _P), ("x_stride", _L), ("grad", _P), ("grad_stride", _L), ("row_weights", _P)] + [
        ("weight_stride", _L), ("grad_x", _P), ("grad_x_stride", _L), ("weighted", _P), ("weighted_stride", _L)] + [
        ("grad_row_weights", _P), ("rows", _L), ("cols", _L)]  # fmt: skip


class TransposedCastProblem(ctypes.Structure):
    _fields_ = [("cast", CastProblem), ("out_t", _P), ("out_t_stride", _L), ("sf_t", _P), ("sf_t_stride", _L)]


class KGroups(ctypes.Structure):
    _fields_ = [("ends", _P), ("ends_stride", _L), ("num_groups", _L), ("rows", _L), ("layout", _I)] + [
        ("alignment", _L)]  # fmt: skip


class GroupedProblem(ctypes.Structure):
    _fields_ = [("problem", TransposedCastProblem), ("groups", KGroups)]


class KGroupedTransposeProblem(ctypes.Structure):
    _fields_ = [("x", _P), ("flat", ctypes.c_bool), ("x_stride", _L), ("mn", _L), ("out", _P), ("out_stride", _L)]


class GroupedTransposeProblem(ctypes.Structure):
    _fields_ = [("problem", KGroupedTransposeProblem), ("groups", KGroups)]


class ExpandFp4Problem(ctypes.Structure):
    _fields_ = [("x", _P), ("x_stride", _L), ("x_batch_stride", _L), ("out", _P), ("out_stride", _L)] + [
        ("out_batch_stride", _L), ("rows", _L), ("cols", _L), ("batch", _L)]  # fmt: skip


class FoldFp4Problem(ctypes.Structure):
    _fields_ = [("x", _P), ("x_stride", _L), ("x_batch_stride", _L), ("sf", _P), ("sf_stride", _L)] + [
        ("sf_batch_stride", _L), ("out", _P), ("out_stride", _L), ("out_batch_stride", _L)] + [
        ("block_sf", _P), ("inexact", _P), ("rows", _L), ("cols", _L), ("batch", _L), ("group_layout", _P)] + [
        ("ends", ctypes.c_bool)]  # fmt: skip


class Bf16TokensProblem(ctypes.Structure):
    _fields_ = [("x", _P), ("x_stride", _L), ("x_batch_stride", _L), ("sf", _P), ("sf_is_packed", ctypes.c_bool)] + [
        ("sf_mn_stride", _L), ("sf_k_stride", _L), ("sf_batch_stride", _L), ("gran_mn", _I), ("gran_k", _I)] + [
        ("out", _P), ("out_stride", _L), ("out_batch_stride", _L), ("rows", _L), ("cols", _L), ("batch", _L)] + [
        ("rows_of_group", _P)]  # fmt: skip


PROBLEMS = [CastProblem, TransposeProblem, ScaleLayoutProblem, GroupedPackProblem, SwigluProblem]
PROBLEMS += [TransposedCastProblem, KGroups, KGroupedTransposeProblem, ExpandFp4Problem, FoldFp4Problem]
PROBLEMS += [Bf16TokensProblem, SwigluBackwardProblem]
_CALLBACK = ctypes.CFUNCTYPE(_I, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, _P, _I)


def _build(arch: str) -> Path:
    """A directory with the library and one .ptx file per source, from the cache if nothing has changed."""
    nvcc = ptx_emulator.nvcc_path()
    if nvcc is None:
        pytest.skip("nvcc not found")
    digest = hashlib.sha256(RUNTIME.encode() + arch.encode() + nvcc.encode())
    for source in [*SOURCES, *HEADERS]:
        digest.update(source.name.encode() + source.read_bytes())
    done = cache_dir() / f"casts-{arch}-{digest.hexdigest()[:16]}"
    if done.exists():
        return done
    with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:
        (Path(tmp) / "runtime.cpp").write_text(RUNTIME)
        command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'src'}", "-t2"]
        command += [f"-gencode=arch=compute_{arch},code=compute_{arch}", "-keep", "-keep-dir", tmp, "--cudart=none"]
        command += ["-shared", "-Xcompiler=-fPIC", "-Xlinker=-Bsymbolic", "-o", f"{tmp}/casts.so", f"{tmp}/runtime.cpp"]
        result = subprocess.run([*command, *map(str, SOURCES)], capture_output=True, text=True, cwd=tmp)
        assert result.returncode == 0, result.stderr[-4000:]
        ready = Path(tempfile.mkdtemp(dir=cache_dir()))
        for name in ["casts.so", *(f"{source.stem}.ptx" for source in SOURCES)]:
            shutil.move(f"{tmp}/{name}", ready / name)
    try:
        ready.rename(done)
    except OSError:  # another process was faster
        shutil.rmtree(ready)
    return done


@functools.cache
def _load(arch: str) -> tuple[ctypes.CDLL, dict[str, ptx_emulator.Module]]:
    directory = _build(arch)
    library = ctypes.CDLL(str(directory / "casts.so"))
    sizes = (ctypes.c_ulong * len(PROBLEMS)).in_dll(library, "sizes")
    assert list(sizes) == [ctypes.sizeof(problem) for problem in PROBLEMS]
    modules = [ptx_emulator.Module.from_file(str(directory / f"{source.stem}.ptx")) for source in SOURCES]
    return library, {entry: module for module in modules for entry in module.entries}


class Run:
    """What a launch function did: the kernel's name, and the emulator's statistics (None where it launched nothing)."""

    kernel: str = ""
    pdl: bool = False
    stats: ptx_emulator.Stats | None = None
    error: Exception | None = None


def memory(x: torch.Tensor, read_only: bool) -> tuple[int, int, str, bool]:
    """The bytes that a tensor's elements span, and no more."""
    extent = 0 if x.numel() == 0 else sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1
    return x.data_ptr(), extent * x.element_size(), "input" if read_only else "output", read_only


def run(
    function: str,
    problem: ctypes.Structure,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    arch: str = "90a",
    pdl: bool = False,
    **options: int,
) -> Run:
    """Calls a launch function; the kernel may touch ``inputs`` (read only) and ``outputs``, nothing else."""
    library, modules = _load(arch)
    result = Run()

    def launch(name: bytes, grid: int, block: int, params: int, num_attributes: int) -> int:
        try:
            result.kernel, result.pdl = name.decode(), num_attributes > 0
            module = modules[result.kernel]
            (size,) = module.info(result.kernel)["params"]
            buffers = [memory(x, True) for x in inputs] + [memory(x, False) for x in outputs]
            args = [ctypes.string_at(params, size)]
            result.stats = module.launch(result.kernel, grid, block, args, buffers=buffers, **options)
        except Exception as e:  # it may not pass through the C++ in between
            result.error = e
            return 1
        return 0

    callback = _CALLBACK(launch)
    library.set_callback(callback)
    error = getattr(library, function)(ctypes.byref(problem), int(pdl))
    if result.error is not None:
        raise result.error
    assert error == 0, f"{function} returned CUDA error {error}"
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Poisoned memory, inputs and comparisons

FORMATS = ["float32", "ue8m0", "packed"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
POISON = 0xA5


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def align(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def buffer(elements: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Poisoned memory that begins ``offset`` elements after a 128-byte boundary."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.full(((elements + offset) * size + 256,), POISON, dtype=torch.uint8)
    begin = -raw.data_ptr() % 128 + offset * size
    return raw[begin : begin + elements * size].view(dtype)


def matrix(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    extent = 0 if 0 in shape else sum((n - 1) * s for n, s in zip(shape, strides)) + 1
    return buffer(extent, dtype, offset).as_strided(shape, strides)


def bits(x: torch.Tensor) -> torch.Tensor:
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    return torch.empty(x.shape, dtype=x.dtype).copy_(x).contiguous().view(size)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but any NaN equals any NaN."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    equal = bits(actual) == bits(expected)
    if actual.dtype.is_floating_point:
        equal |= actual.float().isnan() & expected.float().isnan()
    if not equal.all():
        where = tuple(equal.logical_not().nonzero()[0].tolist())
        raise AssertionError(f"{(~equal).sum()} differ, first at {where}: {actual[where]} != {expected[where]}")


def assert_padding_untouched(x: torch.Tensor) -> None:
    """Elements between the rows of a strided matrix still hold the poison."""
    storage = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    begin = x.storage_offset() * x.element_size()
    extent = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1
    region = storage[begin : begin + extent * x.element_size()].clone().view(-1, x.element_size())
    region.as_strided((*x.shape, x.element_size()), (*(s * x.element_size() for s in x.stride()), 1)).fill_(POISON)
    assert (region == POISON).all(), "written between the rows"


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Groups of very different magnitude, some of them zero, in the range of ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    span = 4 if dtype == torch.float16 else 30
    exponent = torch.randint(-span, span + 1, (shape[0], ceil_div(shape[1], 16) if shape[1] else 0), generator=g)
    scale = torch.exp2(exponent.float()).repeat_interleave(16, 1)[:, : shape[1]]
    x = torch.randn(shape, generator=g) * scale
    x[torch.rand(shape, generator=g) < 0.05] = 0.0
    x[torch.rand(shape, generator=g) < 0.01] = -0.0
    if shape[0] > 2:
        x[shape[0] // 2] = 0.0
    return x.to(dtype)


def cast_input(shape: tuple[int, int], dtype: torch.dtype, seed: int, stride: int = 0, offset: int = 0) -> torch.Tensor:
    x = matrix(shape, (stride or shape[1], 1), dtype, offset)
    return x.copy_(random_values(shape, dtype, seed))


def assert_memory_bound(result: Run, read: int, written: int, slack: float = 1.0) -> None:
    """``read`` and ``written`` are the bytes that have to move; ``slack`` allows for scales of small tiles."""
    assert result.stats is not None
    n = result.stats.counters["total"]
    assert n["smem_load_conflicts"] == 0 and n["smem_store_conflicts"] == 0
    assert n["gmem_load_sectors"] <= slack * read / 32, f"{n['gmem_load_sectors']} sectors, {read / 32} needed"
    assert n["gmem_store_sectors"] <= slack * written / 32, f"{n['gmem_store_sectors']} sectors, {written / 32} needed"

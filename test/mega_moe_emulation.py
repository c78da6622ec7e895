"""Runs Mega MoE under the PTX emulator, all ranks' kernels side by side, through the library's own host code.

`MegaCase` is a layer in one line of text that repeats a failure:

    python test/mega_moe_emulation.py "MegaCase((3, 5), num_experts=4, topk=2, seed=3)"
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import sys
from typing import Any

import torch

from deep_gemm_ops import _capi, mega_moe

import ptx_emulator
from common import same_bits
from gemm_emulation import _LAUNCH, BUDGET, _region, units
from mega_cases import Inputs, MegaCase, Weights


class _BlockScales(ctypes.Structure):
    """MegaMoeBlockScales of src/device/mega_moe_params.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride_expert", ctypes.c_int64),
        ("stride_row", ctypes.c_int64),
        ("stride_k", ctypes.c_int64),
    ]


class Problem(ctypes.Structure):
    """MegaMoeProblem of src/host/mega_moe.h."""

    _fields_ = [
        ("num_ranks", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("num_experts", ctypes.c_int64),
        ("max_tokens", ctypes.c_int64),
        ("topk", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("type", ctypes.c_int),
        ("l1", ctypes.c_void_p),
        ("l2", ctypes.c_void_p),
        ("l1_sf", _BlockScales),
        ("l2_sf", _BlockScales),
        ("l1_words", ctypes.c_void_p),
        ("l2_words", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.c_int64)),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_int64),
        ("stats", ctypes.c_void_p),
        ("clamped", ctypes.c_int),
        ("clamp", ctypes.c_float),
        ("timeout_ns", ctypes.c_int64),
        ("expected_m", ctypes.c_int64),
    ]


def sizes_of(shape: mega_moe.LayerShape) -> dict[str, int]:
    """The members of `Problem` that a shape gives."""
    fields = ("num_ranks", "num_experts", "max_tokens", "topk", "hidden", "intermediate")
    return {**{field: getattr(shape, field) for field in fields}, "type": mega_moe.MMA_TYPES.index(shape.mma_type)}


def library_layout(shape: mega_moe.LayerShape) -> mega_moe.BufferLayout:
    """The layout of a buffer as the library has it."""
    offsets = (ctypes.c_int64 * len(mega_moe.BufferLayout._fields))()
    _capi.library().dg_mega_moe_offsets(ctypes.byref(Problem(**sizes_of(shape))), offsets)
    return mega_moe.BufferLayout(*offsets)


def launches_of(
    buffer: mega_moe.SymmBuffer,
    weights: Weights,
    y: torch.Tensor,
    stats: torch.Tensor | None,
    *,
    arch: int,
    num_sms: int,
    block_tokens: int,
    clamp: float | None,
    timeout_ns: int,
    regions: list,
    module: ptx_emulator.Module | None = None,
) -> list[ptx_emulator.Launch]:
    """A rank's kernels: the layer, and the one that reports time-outs."""
    problem = Problem(**sizes_of(buffer.shape))
    problem.rank, problem.num_tokens = buffer.rank, y.shape[0]
    problem.l1, problem.l2 = weights.l1.data_ptr(), weights.l2.data_ptr()
    if buffer.shape.is_fp4:
        problem.l1_words, problem.l2_words = weights.l1_sf.data_ptr(), weights.l2_sf.data_ptr()
    elif weights.l1_sf is not None and weights.l2_sf is not None:
        problem.l1_sf = _BlockScales(weights.l1_sf.data_ptr(), *weights.l1_sf.stride())
        problem.l2_sf = _BlockScales(weights.l2_sf.data_ptr(), *weights.l2_sf.stride())
    problem.buffers = (ctypes.c_int64 * buffer.shape.num_ranks)(*buffer.handle.buffer_ptrs)
    problem.y, problem.y_stride = y.data_ptr(), max(y.stride(0), buffer.hidden)
    problem.stats = None if stats is None else stats.data_ptr()
    problem.clamped, problem.clamp = int(clamp is not None), clamp or 0.0
    problem.timeout_ns = timeout_ns
    result: list[ptx_emulator.Launch] = []
    failure: list[BaseException] = []

    def launch(kernel, grid, block, cluster, shared_bytes, params, params_bytes):
        try:
            name = kernel.decode()
            ((compiled, entry),) = [(m, e) for _, m in units(f"sm{arch}_mega_moe") for e in m.entries if name in e]
            changed = module if module is not None and entry in module.entries else compiled
            arguments = [ctypes.string_at(params, params_bytes)]
            result.append(
                ptx_emulator.Launch(changed, entry, grid, block, arguments, smem=shared_bytes, buffers=regions)
            )
            return 0
        except BaseException as error:  # an exception cannot cross the C frames in between
            failure.append(error)
            return 1

    error = ctypes.create_string_buffer(4096)
    status = _capi.library().dg_run_mega_moe(
        ctypes.byref(problem),
        arch,
        num_sms,
        block_tokens,
        ctypes.c_void_p(ptx_emulator.encode_tiled_function()),
        _LAUNCH(launch),
        error,
        ctypes.c_size_t(len(error)),
    )
    if failure:
        raise failure[0]
    if status != 0:
        raise RuntimeError(error.value.decode())
    return result


@dataclasses.dataclass
class Prepared:
    """A case's buffers before its first call, poisoned, and the launches of that call."""

    buffers: list[mega_moe.SymmBuffer]
    weights: list[Weights]
    stats: list[torch.Tensor]
    inputs: list[Inputs]
    y: list[torch.Tensor]
    surroundings: list[torch.Tensor]  # what y is a part of
    launches: list[list[ptx_emulator.Launch]]  # of each rank


def prepare(case: MegaCase, call: int = 0, before: Prepared | None = None, **options: Any) -> Prepared:
    """`options` are those of `launches_of`; ``before`` is what an earlier call has left."""
    if before is None:
        buffers, weights = case.buffers(), case.weights()
        layout = library_layout(buffers[0].shape)
        # Nothing but the header and the counters needs to be zero: the rest is NaN before the first call.
        for buffer in buffers:
            buffer.buffer[layout.x : layout.counts] = 0xFF
            buffer.buffer[layout.sources :] = 0xFF
        experts = case.num_experts // case.num_ranks
        stats = [torch.full((experts,), 100 + rank, dtype=torch.int32) for rank in range(case.num_ranks)]
    else:
        buffers, weights, stats = before.buffers, before.weights, before.stats
    inputs = case.inputs(call)
    case.write(buffers, inputs)
    surroundings = [torch.full((n + 2, case.hidden + 8), math.nan, dtype=torch.bfloat16) for n in case.tokens]
    y = [buffer[1 : tokens + 1, : case.hidden] for buffer, tokens in zip(surroundings, case.tokens)]
    options = {
        "arch": case.arch,
        "num_sms": case.num_sms,
        "block_tokens": case.block_tokens,
        "clamp": case.clamp,
        "timeout_ns": 10**15,
        **options,
    }
    modules = options.pop("modules", {})
    launches = []
    # A rank reaches all buffers, but only its own weights, result and statistics.
    shared = [_region(buffer.buffer, f"buffer {rank}", False) for rank, buffer in enumerate(buffers)]
    for rank, buffer in enumerate(buffers):
        regions = [_region(x, f"weights {rank}", True) for x in weights[rank].tensors()]
        regions.append(_region(stats[rank], f"stats {rank}", False))
        if y[rank].numel():
            regions.append(_region(y[rank], f"y {rank}", False))
        arguments = (buffer, weights[rank], y[rank], stats[rank])
        launches.append(launches_of(*arguments, regions=shared + regions, module=modules.get(rank), **options))
    return Prepared(buffers, weights, stats, inputs, y, surroundings, launches)


def run_case(
    case: MegaCase,
    modules: dict[int, ptx_emulator.Module] | None = None,
    block_tokens: list[int] | None = None,
    **options: int,
) -> list[torch.Tensor]:
    """Runs the case, returns the last call's results; raises AssertionError or PtxError with a line that repeats it.

    ``modules``: other versions of the kernel for some ranks. ``block_tokens``: those of each call. ``options`` are the
    emulator's.
    """
    experts = case.num_experts // case.num_ranks
    received = [torch.full((experts,), 100 + rank) for rank in range(case.num_ranks)]
    options = {"budget": BUDGET, "seed": case.seed, "num_sms": case.num_sms * case.num_ranks, **options}
    run = None
    for call in range(case.calls):
        blocks = case.block_tokens if block_tokens is None else block_tokens[call]
        forced = _capi.tune_mega_moe(tile_rows=case.tile_rows) if case.tile_rows > 0 else contextlib.nullcontext()
        with forced:
            run = prepare(case, call, run, block_tokens=blocks, modules=modules or {})
        try:
            for step in zip(*run.launches):
                ptx_emulator.run(step, **options)
        except ptx_emulator.PtxError as error:
            raise ptx_emulator.PtxError(error.kind, f"{error}\nreproduce with: {case.repro}") from None
        case.check(run.y, run.inputs, run.weights)
        layout = library_layout(run.buffers[0].shape)
        for rank, (surroundings, y) in enumerate(zip(run.surroundings, run.y)):
            rest = surroundings.clone()
            rest.as_strided(y.shape, y.stride(), y.storage_offset()).fill_(math.nan)
            assert same_bits(rest, torch.full_like(rest, math.nan)), f"wrote outside\nreproduce with: {case.repro}"
            chosen = torch.cat([i.topk_idx.flatten() for i in run.inputs]) - rank * experts
            received[rank] += torch.bincount(chosen[(chosen >= 0) & (chosen < experts)], minlength=experts)
            assert run.stats[rank].tolist() == received[rank].tolist(), f"statistics\nreproduce with: {case.repro}"
            memory = run.buffers[rank].buffer
            header = memory[:1024].view(torch.int32)
            assert header.tolist()[:2] == [call + 1, 0] and not header[3:].any(), "the header is not ready"
            assert not memory[layout.counts : layout.sources].any(), "the counters are not ready"
    return run.y


def main() -> None:
    case = eval(sys.argv[1], {"MegaCase": MegaCase})
    run_case(case)
    print(f"passed: {case}")


if __name__ == "__main__":
    main()

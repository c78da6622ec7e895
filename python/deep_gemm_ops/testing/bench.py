"""Timing of GPU calls: cold caches, contenders interleaved, every sample checked for a starved queue.

One method for every contender. A sample is a short burst of back-to-back calls between two CUDA events. Before the
burst a spinning kernel holds the stream while the host enqueues all of it, so that host time never shows, and a read of
a buffer larger than the L2 evicts what the previous burst left (a read, because evicting the dirty lines of a memset
would be charged to the call under test). Inside the burst every call has its own operands, so each call finds its
inputs in device memory. Contenders take turns, so that a change of clocks hits all of them.

The spin also lets the chip idle between bursts: figures are those of a card that is not held at its power limit.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = [
    "DeviceLimits",
    "StarvedQueueError",
    "bench_kineto",
    "benchmark_fp8_gemm",
    "burst_plan",
    "count_bytes",
    "device_limits",
    "host_time_per_call",
    "measure_copy_bandwidth",
    "time_interleaved",
]

Call = Callable[[int], Any]
"""A contender: called with the index of the operand set to use."""


class StarvedQueueError(RuntimeError):
    """The device ran out of enqueued work in the middle of a burst, however long the stream was held before it."""


def count_bytes(*items: Any) -> int:
    """Bytes of all tensors in ``items``, looking into lists, tuples and dictionaries; other values count nothing."""
    total = 0
    for item in items:
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, Mapping):
            total += count_bytes(*item.values())
        elif isinstance(item, (list, tuple)):
            total += count_bytes(*item)
    return total


@dataclasses.dataclass(frozen=True)
class DeviceLimits:
    """The card and the ceilings results are measured against."""

    name: str
    num_sms: int
    l2_bytes: int
    fp8_tflops: float  # dense FP8 rate of the datasheet
    copy_gbps: float  # measured: bytes read plus bytes written by a large device-to-device copy
    major: int = 9  # of the compute capability


def device_limits(copy_gbps: float | None = None) -> DeviceLimits:
    """Limits of the current CUDA device; the copy bandwidth is measured unless given."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # FP8 multiply-adds per clock per SM, and the clock NVIDIA's datasheet figures assume.
    rate, ghz = {9: (4096, 1.83), 10: (8192, 1.85)}.get(properties.major, (4096, 1.83))
    return DeviceLimits(
        name=properties.name,
        num_sms=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        fp8_tflops=properties.multi_processor_count * 2 * rate * ghz * 1e-3,
        copy_gbps=measure_copy_bandwidth() if copy_gbps is None else copy_gbps,
        major=properties.major,
    )


def measure_copy_bandwidth(num_bytes: int = 4 << 30, repeats: int = 9) -> float:
    """GB/s of a device-to-device copy of ``num_bytes``, counting bytes read and written; median of ``repeats``."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    samples = []
    for _ in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end))
    return 2 * num_bytes / statistics.median(samples[2:]) * 1e-6


def burst_plan(floor_us: float, set_bytes: int, l2_bytes: int, *, min_burst_us: float = 200.0) -> tuple[int, int]:
    """``(calls per burst, operand sets)`` for a call that takes at least ``floor_us`` and touches ``set_bytes``.

    A burst lasts ``min_burst_us`` or more, which keeps the two events' own time (one to two microseconds) under a
    percent. The sets cover three times the L2 before one comes round again.
    """
    calls = min(64, max(1, math.ceil(min_burst_us / max(floor_us, 1e-3))))
    sets = min(calls, math.ceil(3 * l2_bytes / max(set_bytes, 1)) + 1)
    return calls, max(1, sets)


class _Stream:
    """The work that comes before each burst."""

    def __init__(self, l2_bytes: int) -> None:
        self.flush = torch.ones(max(l2_bytes, 1 << 20), dtype=torch.int32, device="cuda")  # four times the L2
        self.cycles_per_us = 2000  # the spin counts SM clocks, which run at 2 GHz or less

    def burst(self, call: Call, calls: int, sets: int, hold_us: float) -> float | None:
        """Microseconds per call, or None when the device did not wait for the host to finish enqueueing."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(hold_us * self.cycles_per_us))
        torch.max(self.flush)
        begin.record()
        for i in range(calls):
            call(i % sets)
        end.record()
        starved = begin.query()
        end.synchronize()
        return None if starved else begin.elapsed_time(end) * 1e3 / calls


def time_interleaved(
    contenders: Mapping[str, Call],
    *,
    calls: int,
    sets: int,
    l2_bytes: int,
    repeats: int = 20,
    hold_us: float = 500.0,
) -> dict[str, list[float]]:
    """Microseconds per call, ``repeats`` samples for each contender, taken in turns.

    Args:
        contenders: name -> function of the operand set's index.
        calls, sets: see :func:`burst_plan`.
        l2_bytes: size of the L2; four times as much is read before each burst.
        hold_us: how long the stream is held while a burst is enqueued; raised as needed.
    """
    stream = _Stream(l2_bytes)
    for call in contenders.values():
        for i in range(sets):
            call(i)
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    hold = dict.fromkeys(contenders, hold_us)
    names = list(contenders)
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a burst is the likeliest reason for a starved queue
    try:
        for repeat in range(-1, repeats):
            # Nobody always runs first: the order turns with each round.
            turn = repeat % len(names) if names else 0
            for name in names[turn:] + names[:turn]:
                for _ in range(8):
                    value = stream.burst(contenders[name], calls, sets, hold[name])
                    if value is not None:
                        break
                    hold[name] *= 2
                else:
                    raise StarvedQueueError(
                        f"{name}: the host needs more than {hold[name] / 1e3:.0f} ms to enqueue {calls} calls, or the "
                        "calls wait for the device"
                    )
                if repeat >= 0:
                    samples[name].append(value)
    finally:
        if collecting:
            gc.enable()
    return samples


def host_time_per_call(call: Call, *, calls: int = 200, repeats: int = 15) -> float:
    """Microseconds of host time to enqueue one call; median over ``repeats`` bursts of ``calls`` without a wait.

    Use a problem small enough that the device keeps up: a full queue would make the host wait.
    """
    for _ in range(20):
        call(0)
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for _ in range(calls):
            call(0)
        samples.append((time.perf_counter_ns() - begin) * 1e-3 / calls)
    torch.cuda.synchronize()
    return statistics.median(samples)


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: str | Sequence[str] | None = None,
    num_tests: int = 30,
    flush_l2: bool = True,
    with_multiple_kernels: bool = False,
) -> float | tuple[float, ...]:
    """Average kernel time of a call in **seconds**, from PyTorch's profiler.

    Args:
        fn: what to run, on the current stream; the L2 is evicted between runs unless ``flush_l2`` is False.
        kernel_names: part of a kernel's name, or several; None adds up every kernel ``fn`` launches.
        with_multiple_kernels: allow a name to match several different kernels, whose times are then added up.

    Returns one number for None or a string, else a tuple in the order of the names. It is the kernels' own durations,
    without launch latency and the gaps between them; two kernels that overlap count twice. Prefer
    :func:`time_interleaved` for a comparison.
    """
    flush = torch.ones(_l2_bytes(), dtype=torch.int32, device="cuda") if flush_l2 else None
    fn()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(num_tests):
            if flush is not None:
                torch.max(flush)
            # Two spins fence off what fn launches, whether through the runtime or the driver.
            torch.cuda._sleep(20_000)
            fn()
            torch.cuda._sleep(2_000)
        torch.cuda.synchronize()
    is_kernel = torch.autograd.DeviceType.CUDA
    kernels = [(e.time_range.start, e.name, e.device_time) for e in profiler.events() if e.device_type == is_kernel]
    times = _times_between_spins(kernels, num_tests)
    single = kernel_names is None or isinstance(kernel_names, str)
    results = []
    for name in [kernel_names] if single else kernel_names:
        matches = {kernel: us for kernel, us in times.items() if name is None or name in kernel}
        if name is not None and not matches:
            raise ValueError(f"bench_kineto: no kernel has {name!r} in its name, the run had {sorted(times)}")
        if name is not None and len(matches) > 1 and not with_multiple_kernels:
            raise ValueError(f"bench_kineto: {name!r} matches {sorted(matches)}, expected one kernel")
        results.append(sum(matches.values()) * 1e-6 / num_tests)
    return results[0] if single else tuple(results)


def _l2_bytes() -> int:
    return max(1 << 20, torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def _times_between_spins(kernels: Sequence[tuple[float, str, float]], num_tests: int) -> dict[str, float]:
    """Total time by name of the kernels that start after an odd spin and before the next one.

    ``kernels`` are ``(start, name, duration)``; raises RuntimeError when the profiler lost some of the spins.
    """
    totals: dict[str, float] = {}
    spins = 0
    for _, name, duration in sorted(kernels):
        if "spin_kernel" in name:
            spins += 1
        elif spins % 2:
            totals[name] = totals.get(name, 0.0) + duration
    if spins != 2 * num_tests:
        raise RuntimeError(f"bench_kineto: the profiler recorded {spins} spin kernels, expected {2 * num_tests}")
    return totals


def benchmark_fp8_gemm(M: int, N: int, K: int, *, repeats: int = 20, references: bool = True) -> dict[str, Any]:
    """Check and time ``fp8_gemm_nt`` of ``[M, K]`` by ``[N, K]`` (1D-2D scales, BF16 result) beside its references.

    Returns the record that ``python -m deep_gemm_ops.bench --json`` writes for one shape: microseconds, TFLOPS, GB/s,
    share of the copy bandwidth and the ratio to each reference. Needs a CUDA device.
    """
    from ..bench import suites

    return suites.gemm_record(M, N, K, limits=device_limits(), repeats=repeats, references=references)

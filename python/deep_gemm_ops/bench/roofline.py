"""``python -m deep_gemm_ops.bench.roofline``: what products, and the indexer's logits, should cost on a B200, where
nobody has timed them.

For each problem the row that selection chooses, what it moves and computes, and the shortest time that each resource
allows. All rates are the datasheet's but one: 64 bytes per clock from L2 into an SM are an H100's. Needs the compiled
library, but no GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from .. import _capi
from ..testing.cases import BENCH_M, BENCH_SHAPES

NUM_SMS = 148
MULTIPLY_ADDS = {"fp4": 16384, "fp8": 8192, "bf16": 4096}  # per clock and SM; FP4 where both operands are
CLOCK_GHZ = 1.855  # at which these are the datasheet's 4.5 and 2.25 PFLOPS
MEMORY_GBPS = 8000
FILL_BYTES = 64  # per clock and SM, from L2 to shared memory
SHARED_BYTES = 128  # per clock and SM, from shared memory to the tensor core
FP32_OPERATIONS = 128  # per clock and SM, an FMA being one
TENSOR_MEMORY_BYTES = 512  # per clock and SM, from tensor memory to registers


@dataclasses.dataclass(frozen=True)
class Roofline:
    """One product on one row; bytes of the whole chip, times in microseconds."""

    row: str
    operations: float
    memory_bytes: float  # operands, scales and D once each
    fill_bytes: float  # stages of all tiles, from L2 into shared memory
    tensor_memory_bytes: float  # accumulators, written by the tensor core and read by the epilogue once; scales
    operations_us: float
    memory_us: float
    fill_us: float
    shared_us: float

    @property
    def bound(self) -> tuple[str, float]:
        """The resource that takes longest, and how long."""
        times = {
            "operations": self.operations_us,
            "memory": self.memory_us,
            "L2 to SM": self.fill_us,
            "shared memory": self.shared_us,
        }
        return max(times.items(), key=lambda item: item[1])


def roofline(
    m: int, n: int, k: int, operands: str = "fp8", gran_k: int = 128, groups: int = 1, grouping: str = "dense"
) -> Roofline:
    """``operands``: fp8, fp4 (B, the weights) or bf16; BF16 result. ``grouping``: of _capi.GROUPINGS, or masked.

    M, N and K are those of each group, all alike; K-grouped results are FP32.
    """
    bf16 = operands == "bf16"
    recipe = None if bf16 else (1, 1, gran_k)
    fp4 = "b" if operands == "fp4" else ""
    options: dict[str, Any] = {"num_groups": groups, "grouping": grouping, "expected_m": m}
    of_all = {"m": m, "n": n, "k": k}
    if grouping == "masked":
        options |= {"grouping": "m_grouped", "group_layout": "masked"}
    elif grouping == "m_grouped":
        options |= {"group_layout": "offsets"}
        of_all["m"] *= groups
    elif grouping == "k_grouped":
        options |= {"group_layout": "sizes", "float_output": True, "layout": "tn" if bf16 else "nt", "expected_m": 0}
        of_all["k"] *= groups
    choice = _capi.select(**of_all, recipe=recipe, fp4=fp4, arch="sm_100a", num_sms=NUM_SMS, **options)
    row = next(row for row in _capi.instances("sm_100a") if row["index"] == choice["row"])
    return _of_row(row, m, n, k, operands, gran_k, groups)


def _of_row(row: dict[str, Any], m: int, n: int, k: int, operands: str, gran_k: int, groups: int = 1) -> Roofline:
    rows, cols = (n, m) if row["swap_ab"] else (m, n)
    block_rows, block_cols = (row["block_n"], row["block_m"]) if row["swap_ab"] else (row["block_m"], row["block_n"])
    pair, split = row["row_ctas"], row["split_k"]
    tiles = groups * math.ceil(rows / (block_rows * pair)) * math.ceil(cols / block_cols)
    blocks = math.ceil(k / row["block_k"])
    ctas = tiles * pair * split
    item = 2.0 if operands == "bf16" else 1.0
    scale_bytes = 0.0 if operands == "bf16" else (m + n) * k / gran_k
    d_bytes = 4.0 if row["grouping"] == "k_grouped" else 2.0
    memory = m * k * item + n * k * (0.5 if operands == "fp4" else item) + scale_bytes + d_bytes * m * n
    memory *= groups
    # A CTA's stage: its rows, and its part of the columns. FP4 leaves L2 packed and lies in shared memory unpacked.
    stage = 128 * (block_rows + block_cols / pair)
    packed = 64 * (block_rows if row["swap_ab"] else block_cols / pair) if operands == "fp4" else 0
    scales = 0.0 if operands == "bf16" else (block_rows + block_cols) * row["block_k"] / gran_k
    busy = min(ctas, NUM_SMS)  # SMs with work, all of them equally much: waves are not counted here
    clock = CLOCK_GHZ * 1e3  # per microsecond
    work = tiles * blocks * pair  # stages of all CTAs
    operations = 2.0 * groups * m * n * k
    padded = 2.0 * tiles * block_rows * pair * block_cols * k
    rate = 2 * MULTIPLY_ADDS["bf16" if operands == "bf16" else "fp8"]
    return Roofline(
        row=row["name"],
        operations=operations,
        memory_bytes=memory,
        fill_bytes=work * (stage - packed + scales),
        tensor_memory_bytes=2 * 4.0 * ctas * block_rows * block_cols + work * 4 * scales,
        operations_us=padded / (busy * rate * clock),
        memory_us=memory / MEMORY_GBPS * 1e-3,
        fill_us=work * (stage - packed + scales) / (busy * FILL_BYTES * clock),
        shared_us=work * stage / (busy * SHARED_BYTES * clock),
    )


MEGA_EXPERTS, MEGA_HIDDEN, MEGA_INTERMEDIATE = 32, 7168, 2048


def mega_moe_roofline(tokens: int, operands: str = "fp4") -> Roofline:
    """A rank's expert layer, ``tokens`` for each of its experts: ``operands`` are fp4 (the weights) or bf16."""
    bf16 = operands == "bf16"
    block = _capi.mega_moe_block_tokens(tokens)
    rows = 256 if block == 128 else 128  # of weights: MegaMoeLayout of src/sm100/mega_moe_traits.h
    row = {"name": f"{rows} x {block}", "swap_ab": True, "block_m": block, "block_n": rows, "row_ctas": 1}
    row |= {"block_k": 64 if bf16 else 128, "split_k": 1, "grouping": "m_grouped"}
    first = _of_row(row, tokens, 2 * MEGA_INTERMEDIATE, MEGA_HIDDEN, operands, 32, MEGA_EXPERTS)
    second = _of_row(row, tokens, MEGA_HIDDEN, MEGA_INTERMEDIATE, operands, 32, MEGA_EXPERTS)
    sums = {
        field.name: getattr(first, field.name) + getattr(second, field.name)
        for field in dataclasses.fields(Roofline)
        if field.name != "row"
    }
    # Weights once. Of a token: x read, written to the pool and read again, h written and read, the result, too.
    item, of_weights = (2.0, 2.0) if bf16 else (1 + 1 / 32, 0.5 + 1 / 32)
    weights = 3 * MEGA_HIDDEN * MEGA_INTERMEDIATE * of_weights
    of_token = item * (3 * MEGA_HIDDEN + 2 * MEGA_INTERMEDIATE) + 2 * 2 * MEGA_HIDDEN
    memory = MEGA_EXPERTS * (weights + tokens * of_token)
    return Roofline(row["name"], **{**sums, "memory_bytes": memory, "memory_us": memory / MEMORY_GBPS * 1e-3})


def mega_moe_table() -> str:
    """Markdown, one line for each number of tokens of an expert and type."""
    lines = [
        "| tokens of an expert | operands | tile | GFLOP | memory, MB | L2 to SM, MB | bound | at least, µs |",
        "|---:|---|---|---:|---:|---:|---|---:|",
    ]
    for operands, name in (("fp4", "FP8 x FP4"), ("bf16", "BF16")):
        for tokens in (1, 16, 64, 256):
            r = mega_moe_roofline(tokens, operands)
            megabytes = [f"{x * 1e-6:.1f}" for x in (r.memory_bytes, r.fill_bytes)]
            bound, us = r.bound
            cells = [tokens, name, r.row, f"{r.operations * 1e-9:.1f}", *megabytes, bound, f"{us:.1f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def table(problems: Iterator[tuple]) -> str:
    """Markdown, one line for each problem: arguments of `roofline`."""
    lines = [
        "| M | N | K | operands | row | GFLOP | memory, MB | L2 to SM, MB | tensor memory, MB | bound | at least, µs |",
        "|---:|---:|---:|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for m, n, k, operands, gran_k, *groups in problems:
        r = roofline(m, n, k, operands, gran_k, *groups)
        bound, us = r.bound
        names = {"fp8": f"FP8, {gran_k}", "fp4": f"FP8 x FP4, {gran_k}", "bf16": "BF16"}
        megabytes = [f"{x * 1e-6:.1f}" for x in (r.memory_bytes, r.fill_bytes, r.tensor_memory_bytes)]
        row = r.row.removeprefix("sm100_")
        kind = names[operands] if not groups else f"{names[operands]}; {groups[0]} x {groups[1].replace('_', '-')}"
        cells = [m, n, k, kind, f"`{row}`", f"{r.operations * 1e-9:.1f}", *megabytes, bound, f"{us:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def problems() -> Iterator[tuple]:
    """The benchmark's shapes in FP8, one of them in every type, and groups: arguments of `roofline`."""
    for m in BENCH_M:
        for n, k in BENCH_SHAPES:
            yield m, n, k, "fp8", 128
    for m in (1, 64, 4096):
        for operands, gran_k in (("fp8", 32), ("fp4", 32), ("bf16", 128)):
            yield m, 4096, 7168, operands, gran_k
    for operands, gran_k in (("fp8", 128), ("fp4", 32), ("bf16", 128)):
        for m, groups in ((4096, 8), (1024, 32), (128, 32)):
            yield m, 4096, 7168, operands, gran_k, groups, "m_grouped"
            yield m, 7168, 2048, operands, gran_k, groups, "m_grouped"
        for m, groups in ((16, 32), (192, 6)):
            yield m, 4096, 7168, operands, gran_k, groups, "masked"
    for operands in ("fp8", "bf16"):
        yield 4096, 7168, 4096, operands, 128, 8, "k_grouped"
        yield 128, 512, 128, operands, 128, 128, "batched"


# ---------------------------------------------------------------------------------------------------------------------
# Logits


@dataclasses.dataclass(frozen=True)
class LogitsRoofline:
    """A call of the indexer's operators; bytes of the whole chip, times in microseconds."""

    row: str
    operations: float
    memory_bytes: float  # queries, keys, scales and weights once each, logits in FP32
    fill_bytes: float  # keys of all tiles, from L2 into shared memory
    tensor_memory_bytes: float  # accumulators, written by the tensor core and read once
    times: dict[str, float]

    @property
    def bound(self) -> tuple[str, float]:
        """The resource that takes longest, and how long."""
        return max(self.times.items(), key=lambda item: item[1])


def logits_roofline(tokens: int, keys: int, heads: int, dim: int, operands: str, sequences: int = 0) -> LogitsRoofline:
    """``operands``: fp8 or fp4. With ``sequences`` each has ``tokens`` new ones and a cache of ``keys``; without them
    ``tokens`` are the last ones of ``keys``, each of which sees those before it."""
    fp4 = operands == "fp4"
    row = next(
        row
        for row in _capi.mqa_instances()
        if (row["arch"], row["heads"], row["paged"], row["fp4"]) == ("sm_100a", heads, sequences > 0, fp4)
    )
    row_bytes = dim / 2 if fp4 else dim
    per_group = row["cols"] // heads
    groups = math.ceil(tokens / per_group)
    # Columns of all groups, the last of which may have fewer tokens; the epilogue reads 32 at a time.
    cols = sum(32 * math.ceil(min(per_group, tokens - i * per_group) * heads / 32) for i in range(groups))
    # Keys that a token sees, on average: tiles count as far as they are full.
    seen = keys if sequences else keys - (tokens - 1) / 2
    batch = max(sequences, 1)
    fill = batch * groups * seen * (row_bytes + 4)
    all_keys = batch * keys * (row_bytes + 4)
    pairs = batch * tokens * seen
    queries = batch * tokens * heads * (row_bytes + 4 + (4 if fp4 else 0))
    memory = all_keys + queries + 4.0 * pairs
    clocks = CLOCK_GHZ * 1e3 * NUM_SMS  # per microsecond, of all SMs
    elements = batch * seen * cols
    return LogitsRoofline(
        row=row["name"],
        operations=2.0 * pairs * heads * dim,
        memory_bytes=memory,
        fill_bytes=fill,
        tensor_memory_bytes=2 * 4 * elements,
        times={
            "operations": elements * dim / MULTIPLY_ADDS[operands] / clocks,
            "FP32": elements * 2 / FP32_OPERATIONS / clocks,
            "tensor memory": elements * 4 / TENSOR_MEMORY_BYTES / clocks,
            "memory": memory / MEMORY_GBPS * 1e-3,
            "L2 to SM": fill / FILL_BYTES / clocks,
        },
    )


def logits_problems() -> Iterator[tuple]:
    """Arguments of `logits_roofline`."""
    for operands in ("fp8", "fp4"):
        for tokens, keys, heads in ((4096, 8192, 64), (4096, 65536, 64), (4096, 8192, 32)):
            yield tokens, keys, heads, 128, operands
        for tokens, keys, sequences in ((1, 8192, 64), (2, 32768, 64), (4, 8192, 256)):
            yield tokens, keys, 64, 128, operands, sequences


def logits_table() -> str:
    """Markdown, one line for each problem."""
    lines = [
        "| tokens | keys | heads | operands | row | GFLOP | memory, MB | L2 to SM, MB | tensor memory, MB | bound "
        "| at least, µs |",
        "|---:|---:|---:|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for tokens, keys, heads, dim, operands, *sequences in logits_problems():
        r = logits_roofline(tokens, keys, heads, dim, operands, *sequences)
        bound, us = r.bound
        megabytes = [f"{x * 1e-6:.1f}" for x in (r.memory_bytes, r.fill_bytes, r.tensor_memory_bytes)]
        kind = operands.upper() + (f"; {sequences[0]} sequences" if sequences else "")
        row = r.row.removeprefix("sm100_")
        cells = [tokens, keys, heads, kind, f"`{row}`", f"{r.operations * 1e-9:.1f}", *megabytes, bound, f"{us:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(problems()), mega_moe_table(), logits_table(), sep="\n\n")

"""What a GEMM kernel executes per K block and per tile, for each warp role.

    python -m ptx_emulator.profile --row 3            (in test/, with the library installed)

Three runs of one cluster that differ in the number of tiles and of K blocks; their differences are exact, for the
counters do not depend on the schedule. The kernel is run through `gemm_emulation.run_row`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence

from .counters import Counters, ranges

# Multiply-adds per cycle of one SM's tensor cores, FP8 operands on sm_90 (a BF16 one counts as two); warp instructions
# issued per cycle.
TENSOR_RATE = 4096
ISSUE_SLOTS = 4
SHARED_RATE = 128  # bytes per clock of an SM's shared memory
STAGE_BYTES = 128  # of K
CLASSES = "tensor fp32 integer convert move shared global bulk barrier other".split()


@dataclasses.dataclass
class Role:
    """Warps of a CTA with one job, and the average per warp of each counter."""

    name: str
    warps: list[int]
    per_block: dict[str, float]  # per K block
    per_tile: dict[str, float]  # per tile, K blocks left out
    fixed: dict[str, float]  # once per CTA

    def instructions(self, table: str = "per_block") -> float:
        """Instructions of all classes per warp."""
        return sum(getattr(self, table).get(c, 0) for c in CLASSES)


def _roles(counters: Counters) -> dict[str, list[int]]:
    """Consumers use the tensor cores; loaders fetch from global memory; the rest."""
    roles: dict[str, list[int]] = {}
    for warp, c in counters["warps"].items():
        if c["tensor"]:
            name = "consumer"
        elif c["bulk_load_bytes"]:
            name = "copy producer"
        elif c["gmem_loads"] or c["global"]:
            name = "load producer"
        else:
            name = "other"
        roles.setdefault(name, []).append(warp)
    return roles


def profile(run: Callable[[int, int], Counters], tiles: tuple[int, int], blocks: tuple[int, int]) -> list[Role]:
    """Splits counters into a part per K block, per tile and per CTA.

    `run(t, k)` gives the counters, summed over CTAs, of t tiles of k K blocks each; it is called with both numbers of
    tiles at the first number of blocks, and with the second number of blocks. Numbers are those of one CTA.
    """
    base, longer, more = run(tiles[0], blocks[0]), run(tiles[0], blocks[1]), run(tiles[1], blocks[0])
    ctas = len(base["ctas"])
    out = []
    for name, warps in _roles(base).items():

        def mean(counters: Counters, counter: str, warps: list[int] = warps) -> float:
            return sum(counters["warps"][w][counter] for w in warps) / (len(warps) * ctas)

        role = Role(name, warps, {}, {}, {})
        for c in base["total"]:
            if c == "polls":
                continue
            at = mean(base, c)
            block = (mean(longer, c) - at) / (tiles[0] * (blocks[1] - blocks[0]))
            tile = (mean(more, c) - at) / (tiles[1] - tiles[0]) - block * blocks[0]
            for table, value in (
                (role.per_block, block),
                (role.per_tile, tile),
                (role.fixed, at - tiles[0] * (tile + block * blocks[0])),
            ):
                if abs(value) > 1e-9:
                    table[c] = round(value, 6)
        out.append(role)
    return out


def print_profile(roles: Sequence[Role], tile_macs_per_block: int, file=None) -> None:
    """Tables per K block and per tile, then tensor-core cycles against issue slots."""
    heads = [f"{r.name} ({ranges(r.warps)})" for r in roles]
    names = dict.fromkeys(n for r in roles for n in r.per_block | r.per_tile)
    for title, table in (("K block", "per_block"), ("tile", "per_tile")):
        print(f"\nper warp and {title:22s}" + "".join(f"{h:>26s}" for h in heads), file=file)
        print(f"{'  instructions':35s}" + "".join(f"{r.instructions(table):26,.1f}" for r in roles), file=file)
        for n in names:
            values = [getattr(r, table).get(n, 0) for r in roles]
            if any(values):
                print(f"  {n:33s}" + "".join(f"{v:26,.1f}" for v in values), file=file)
    cycles = tile_macs_per_block / TENSOR_RATE
    slots = sum(r.instructions() * len(r.warps) for r in roles) / ISSUE_SLOTS
    print(
        f"\nper K block of a CTA: {cycles:.0f} cycles of the tensor cores, {slots:.0f} issue slots per scheduler "
        f"(PTX instructions, {slots / cycles:.0%})",
        file=file,
    )


def bounds(roles: Sequence[Role], info: dict, k_blocks: int = 0) -> dict[str, float]:
    """Clocks that an SM's units need by published rates, for a K block, or for a tile of several.

    An instruction reads both operands from shared memory, for each 64 rows anew.
    """
    blocks, tiles = (k_blocks, 1) if k_blocks else (1, 0)
    rows, cols = info["block_m"], info["block_n"]
    if info["swap_ab"]:
        rows, cols = cols, rows

    def total(name: str) -> float:
        return sum(len(r.warps) * (blocks * r.per_block.get(name, 0) + tiles * r.per_tile.get(name, 0)) for r in roles)

    consumers = [r for r in roles if r.name == "consumer"]
    issue = sum(len(r.warps) * (blocks * r.instructions() + tiles * r.instructions("per_tile")) for r in consumers)
    tensor = blocks * rows * cols * STAGE_BYTES / TENSOR_RATE
    reads = blocks * rows // 64 * (64 + cols) * STAGE_BYTES
    return {
        "tensor": tensor,
        "issue": issue / ISSUE_SLOTS,
        "shared": (reads + total("bulk_delivered_bytes")) / SHARED_RATE,
        "bytes per tensor clock": total("bulk_load_bytes") / tensor,
    }


def profile_row(
    row: int, tiles: tuple[int, int] = (4, 8), blocks: tuple[int, int] = (12, 24)
) -> tuple[list[Role], dict]:
    """The profile of a row of the library's table, and the row. Fewer tiles and blocks are enough for what does not
    depend on where a tile lies: the figures of consumers and copies per K block.
    """
    import torch

    from deep_gemm_ops import _capi

    from gemm_emulation import FP4_FAMILIES, pack_ue8m0, run_row

    info = _capi.instances()[row]
    split, gran_k = info["split_k"], info["gran_k"]
    gran_n = 128 if info["scaling"] == "1d2d" else 1

    def run(tiles: int, blocks: int) -> Counters:
        # Two tiles of columns, or as many as a cluster has, so that all CTAs have work; each CTA of a split tile has
        # its share of K.
        cols = max(2, info["col_ctas"])
        m, n, k = tiles // cols * info["block_m"], cols * info["block_n"], blocks * split * info["block_k"]
        gran = None
        if info["scaling"] == "none":
            mn_major = (info["a_mn_major"], info["b_mn_major"])
            a, b = (torch.ones((k, mn) if t else (mn, k)).bfloat16() for mn, t in zip((m, n), mn_major))
            sfa = sfb = None
        else:
            gran = (1, gran_n, gran_k)
            a, b = (torch.ones(mn, k).to(torch.float8_e4m3fn) for mn in (m, n))
            sfa, sfb = (torch.ones(-(-k // gran_k), -(-mn // gran)).T for mn, gran in ((m, 1), (n, gran_n)))
            if info["family"] in FP4_FAMILIES:
                b = torch.full((n, k // 2), 0x22, dtype=torch.uint8)  # ones
            if info["family"] == "bf16_fp4_gemm":
                a, sfa = a.bfloat16(), None if gran_k == 32 else sfa
            if info["scaling"] == "ue8m0":
                sfb = pack_ue8m0(torch.ones(n, k // 32)).T.contiguous().T
        d = torch.empty(m, n, dtype=torch.bfloat16)
        stats = run_row(row, a, sfa, b, sfb, d, gran=gran, num_sms=info["cluster_size"], counters=True)
        assert (d == torch.tensor(k).to(d.dtype)).all(), "wrong result"
        return stats.counters

    # `split` CTAs of a cluster share each tile.
    at_once = info["cluster_size"] // split
    roles = profile(lambda tiles, blocks: run(tiles * at_once, blocks), tiles, blocks)
    return roles, info


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ptx_emulator.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--row", type=int, action="append", help="index in the table; several allowed; default: all")
    for size in "mnk":
        parser.add_argument(f"--{size}", type=int, default=4096, help="of the problem; default: 4096")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of tables")
    options = parser.parse_args(arguments)
    if options.row is None:
        from deep_gemm_ops import _capi

        options.row = [r["index"] for r in _capi.instances()]
    for index in options.row:
        roles, info = profile_row(index)
        if options.json:
            print(json.dumps({"row": index, "name": info["name"], "roles": [dataclasses.asdict(r) for r in roles]}))
        else:
            print(f"\n=== row {index}: {info['name']}")
            print_profile(roles, info["block_m"] * info["block_n"] * STAGE_BYTES)
            k_blocks = -(-options.k // (info["split_k"] * info["block_k"]))
            tiles = -(-options.m // info["block_m"]) * -(-options.n // info["block_n"])
            for title, count in (("K block", 0), (f"tile of {k_blocks} K blocks ({tiles} tiles)", k_blocks)):
                values = ", ".join(f"{name} {value:,.1f}" for name, value in bounds(roles, info, count).items())
                print(f"clocks of an SM per {title}: {values}")


if __name__ == "__main__":
    main()

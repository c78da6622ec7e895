"""Numerical comparison for tests and benchmarks.

A global error hides a wrong tile: one bad 128 x 128 tile of a 4096 x 7168 result moves the global relative error by
two parts in a hundred thousand. ``compare`` therefore reports the worst tile beside the global figure, insists
that NaN and Inf sit at the same places, and is written so that a NaN anywhere in the arithmetic fails the comparison.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

__all__ = ["Comparison", "assert_close", "assert_equal", "calc_diff", "compare", "error_bar"]


def error_bar(out_dtype: torch.dtype, family: str = "fp8") -> float:
    """Largest relative Frobenius error an op may have against float64 on its dequantised operands.

    Args:
        out_dtype: dtype of the result, ``torch.bfloat16`` or ``torch.float32``.
        family: ``"fp8"`` (FP4 included), ``"bf16"`` or ``"tf32"``, the type the tensor core multiplies in.

    Hopper's FP8 tensor cores keep about 14 bits inside one 128-wide block of K, hence 1.5e-3 for FP32 output.
    """
    if out_dtype == torch.bfloat16:
        return 4e-3
    if out_dtype != torch.float32:
        raise ValueError(f"error_bar: out_dtype is {out_dtype}, expected torch.bfloat16 or torch.float32")
    bars = {"fp8": 1.5e-3, "bf16": 1e-5, "tf32": 1e-3}
    if family not in bars:
        raise ValueError(f"error_bar: family is {family!r}, expected one of {sorted(bars)}")
    return bars[family]


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """Symmetric dissimilarity ``1 - 2<x, y> / (<x, x> + <y, y>)`` in float64.

    Zero for equal tensors (two all-zero ones included), about half the squared relative error for close ones, NaN if
    either holds a NaN. A global figure: use :func:`compare` where one wrong tile must not pass.
    """
    if x.shape != y.shape:
        raise ValueError(f"calc_diff: y has shape {list(y.shape)}, expected {list(x.shape)}")
    x, y = _to_float64(x), _to_float64(y.to(x.device))
    energy = float((x * x).sum() + (y * y).sum())
    if energy == 0.0:
        return 0.0
    # ||x - y||^2 is the same quantity without the cancellation of 1 - (nearly 1).
    return float(((x - y) ** 2).sum()) / energy


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. ``ok`` is the verdict, ``describe()`` the sentence to print when it is False."""

    ok: bool
    tol: float
    tile_tol: float
    rel_error: float  # ||actual - expected|| / ||expected|| over all finite elements (Frobenius)
    worst_tile_error: float  # the same quantity of the worst tile
    worst_tile: tuple[int, ...]  # leading indices, first row and first column of that tile
    tile: tuple[int, int]
    max_abs_error: float
    max_abs_at: tuple[int, ...]  # index of the element with the largest absolute error
    mask_mismatches: int  # elements where one side is NaN or +-Inf and the other is not the same
    mask_mismatch_at: tuple[int, ...] | None  # the first of them
    reason: str  # "" when ok

    def __bool__(self) -> bool:
        return self.ok

    def describe(self) -> str:
        at = list(self.mask_mismatch_at) if self.mask_mismatch_at is not None else None
        masks = f"; {self.mask_mismatches} NaN/Inf mismatches, first at {at}" if self.mask_mismatches else ""
        verdict = "ok" if self.ok else f"FAILED ({self.reason})"
        return (
            f"{verdict}: relative error {self.rel_error:.3e} (allowed {self.tol:.1e}), worst "
            f"{self.tile[0]}x{self.tile[1]} tile {self.worst_tile_error:.3e} (allowed {self.tile_tol:.1e}) at "
            f"{list(self.worst_tile)}, largest absolute error {self.max_abs_error:.3e} at "
            f"{list(self.max_abs_at)}{masks}"
        )


def compare(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    tol: float,
    tile_tol: float | None = None,
    tile: tuple[int, int] = (64, 64),
) -> Comparison:
    """Compare ``actual`` with ``expected`` globally and tile by tile.

    Args:
        actual: result under test, any floating or integer dtype, FP8 included; ``[..., M, N]`` (rank 0 and 1 are taken
            as one row).
        expected: reference of the same shape, usually float64; the arithmetic runs on its device.
        tol: largest relative Frobenius error allowed overall. 0 demands equality.
        tile_tol: largest relative error allowed of a tile, ``2 * tol`` by default: a ragged tile of a few elements
            scatters more than the whole.
        tile: rows and columns of a tile.

    A tile's error is its error norm over the larger of its own norm and the norm a rank-1 model predicts for it from
    the energy of its rows and of its columns. So a tile that is small only through cancellation is not judged by that
    accident, while rows or columns with small scales are still judged at their own size.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"compare: actual has shape {list(actual.shape)}, expected {list(expected.shape)}")
    if tile[0] <= 0 or tile[1] <= 0:
        raise ValueError(f"compare: tile is {tile}, expected two positive sizes")
    tile_tol = 2 * tol if tile_tol is None else tile_tol
    if actual.numel() == 0:
        return Comparison(True, tol, tile_tol, 0.0, 0.0, (), tile, 0.0, (), 0, None, "")

    shape = tuple(expected.shape)
    rows, cols = (shape[-2] if len(shape) >= 2 else 1), (shape[-1] if len(shape) >= 1 else 1)
    want = _to_float64(expected).reshape(-1, rows, cols)
    got = _to_float64(actual.detach().to(expected.device)).reshape(-1, rows, cols)

    finite = torch.isfinite(want) & torch.isfinite(got)
    # Equal infinities compare equal; two NaNs match whatever their payload.
    same = finite | (want == got) | (torch.isnan(want) & torch.isnan(got))
    mismatches = int((~same).sum())
    mismatch_at = _unravel(int((~same).flatten().to(torch.uint8).argmax()), shape) if mismatches else None

    zero = torch.zeros((), dtype=torch.float64, device=want.device)
    diff = torch.where(finite, got - want, zero)
    want = torch.where(finite, want, zero)
    # One power-of-two scale for everything keeps squares of huge or tiny values inside float64.
    peak = float(torch.maximum(want.abs().max(), diff.abs().max()))
    scale = 2.0 ** -math.frexp(peak)[1] if peak > 0 and math.isfinite(peak) else 1.0
    error_sq, want_sq = _tile_energy(diff * scale, tile), _tile_energy(want * scale, tile)

    total = float(want_sq.sum())
    rel_error = _ratio(float(error_sq.sum()), total)
    energy = want_sq.sum((1, 2), keepdim=True)
    model = want_sq.sum(2, keepdim=True) * want_sq.sum(1, keepdim=True) / torch.where(energy > 0, energy, energy + 1)
    base = torch.maximum(want_sq, model)
    tile_error = torch.where(error_sq == 0, error_sq, (error_sq / base).sqrt())  # 0/0 is no error, x/0 is infinite
    # argmax puts NaN first, so a NaN becomes the worst tile instead of vanishing.
    worst = int(tile_error.flatten().argmax())
    batch, tile_row, tile_col = _unravel(worst, tuple(tile_error.shape))
    worst_tile_error = float(tile_error.flatten()[worst])
    at = int(diff.abs().flatten().argmax())
    max_abs = float(diff.abs().flatten()[at])

    reason = ""
    if mismatches:
        reason = "NaN or Inf at different places"
    elif not rel_error <= tol:
        reason = "relative error too large"
    elif not worst_tile_error <= tile_tol:
        reason = "a tile is wrong"
    lead = _unravel(batch, shape[:-2]) if len(shape) > 2 else ()
    first = (tile_row * tile[0], tile_col * tile[1])
    return Comparison(
        ok=not reason,
        tol=tol,
        tile_tol=tile_tol,
        rel_error=rel_error,
        worst_tile_error=worst_tile_error,
        worst_tile=lead + (first if len(shape) >= 2 else first[1:]),
        tile=tile,
        max_abs_error=max_abs,
        max_abs_at=_unravel(at, shape),
        mask_mismatches=mismatches,
        mask_mismatch_at=mismatch_at,
        reason=reason,
    )


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    tol: float,
    tile_tol: float | None = None,
    tile: tuple[int, int] = (64, 64),
    repro: str = "",
) -> Comparison:
    """Raise AssertionError unless :func:`compare` is satisfied; ``repro`` is the one line that repeats the failure."""
    result = compare(actual, expected, tol=tol, tile_tol=tile_tol, tile=tile)
    if not result.ok:
        raise AssertionError(result.describe() + (f"\nreproduce with: {repro}" if repro else ""))
    return result


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, *, repro: str = "") -> Comparison:
    """Raise AssertionError unless both hold the same values (NaN equals NaN, -0 equals 0)."""
    return assert_close(actual, expected, tol=0.0, repro=repro)


def _to_float64(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    # FP8 dtypes convert to float32 everywhere, to float64 not in every build of PyTorch.
    if x.is_floating_point() and x.element_size() == 1:
        x = x.to(torch.float32)
    return x.to(torch.float64)


def _tile_energy(x: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Sum of squares per tile: ``[B, M, N]`` -> ``[B, ceil(M / tile[0]), ceil(N / tile[1])]``."""
    batch, rows, cols = x.shape
    padded_rows, padded_cols = -(-rows // tile[0]) * tile[0], -(-cols // tile[1]) * tile[1]
    x = torch.nn.functional.pad(x * x, (0, padded_cols - cols, 0, padded_rows - rows))
    return x.view(batch, padded_rows // tile[0], tile[0], padded_cols // tile[1], tile[1]).sum((2, 4))


def _ratio(error_sq: float, base_sq: float) -> float:
    if error_sq == 0.0:
        return 0.0
    return math.sqrt(error_sq / base_sq) if base_sq > 0 else (math.inf if error_sq > 0 else math.nan)


def _unravel(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    out: list[int] = []
    for size in reversed(shape):
        out.append(index % size)
        index //= size
    return tuple(reversed(out))

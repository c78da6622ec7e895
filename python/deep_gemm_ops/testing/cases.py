"""Problems and operands shared by the tests and the benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .. import reference

__all__ = ["BENCH_CASTS", "BENCH_M", "BENCH_PRENORM", "BENCH_SHAPES", "GemmCase", "GemmOperands", "make_gemm_operands"]

BENCH_SHAPES: tuple[tuple[int, int], ...] = (
    (2112, 7168),
    (576, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
)
"""``(N, K)`` of DeepSeek-V3's dense projections, which public figures use too."""

BENCH_M: tuple[int, ...] = (1, 16, 64, 128, 4096)

BENCH_CASTS: tuple[tuple[int, int], ...] = ((4096, 7168), (4096, 16384), (16384, 7168))
"""``(rows, columns)`` of BF16 activations to cast."""

BENCH_PRENORM: tuple[tuple[int, int, int], ...] = tuple(
    (m, 24, k) for k in (28672, 7168) for m in (8192, 4096, 512, 137, 13)
)
"""``(M, N, K)`` of hyper-connections' pre-norm."""


@dataclasses.dataclass(frozen=True)
class GemmCase:
    """One FP8 GEMM. Its ``repr`` is a line that builds it again."""

    m: int
    n: int
    k: int
    layout: str = "nt"
    recipe: tuple[int, int, int] = (1, 128, 128)
    out_dtype: torch.dtype = torch.bfloat16
    accumulate: str = ""  # "", "full" (c is [M, N]), "row" (c is [N])
    use_ue8m0: bool = False
    seed: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


@dataclasses.dataclass(frozen=True)
class GemmOperands:
    """Arguments of ``fp8_gemm_<layout>``; iterating gives the four positional ones."""

    a: torch.Tensor
    sfa: torch.Tensor
    b: torch.Tensor
    sfb: torch.Tensor
    c: torch.Tensor | None = None

    def __iter__(self):
        return iter((self.a, self.sfa, self.b, self.sfb))

    def tensors(self) -> list[torch.Tensor]:
        return [*self] + ([self.c] if self.c is not None else [])

    def clone(self) -> GemmOperands:
        """The same values and strides at other addresses."""
        return GemmOperands(*(_clone(x) for x in self), _clone(self.c) if self.c is not None else None)


def make_gemm_operands(case: GemmCase, device: torch.device | str = "cpu") -> GemmOperands:
    """Normally distributed BF16 matrices through the reference casts; operands as ``fp8_gemm_<layout>`` wants them.

    The random numbers come from the CPU for small problems, so that a failure on a GPU repeats on a machine without
    one, and from the device for large ones.
    """
    a = _normal((case.m, case.k), case.seed, device)
    b = _normal((case.n, case.k), case.seed + 1, device)
    gran_m, gran_n, gran_k = case.recipe
    a, sfa = _cast(a, gran_m, gran_k, case.use_ue8m0)
    b, sfb = _cast(b, gran_n, gran_k, case.use_ue8m0)
    if case.layout[0] == "t":
        a, sfa = a.t().contiguous(), sfa.t()
    if case.layout[1] == "n":
        b, sfb = b.t().contiguous(), sfb.t()
    c = None
    if case.accumulate:
        shape = {"full": (case.m, case.n), "row": (case.n,)}[case.accumulate]
        c = _normal(shape, case.seed + 2, device).to(case.out_dtype)
    return GemmOperands(a, sfa, b, sfb, c)


def _normal(shape: Sequence[int], seed: int, device: torch.device | str) -> torch.Tensor:
    count = 1
    for size in shape:
        count *= size
    source = torch.device(device) if count > 1 << 22 else torch.device("cpu")
    generator = torch.Generator(source).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=source).to(device, torch.bfloat16)


def _cast(x: torch.Tensor, gran_mn: int, gran_k: int, use_ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if gran_mn == 1:
        return reference.per_token_cast_to_fp8(x, gran_k=gran_k, use_ue8m0=use_ue8m0)
    return reference.per_block_cast_to_fp8(x, gran_k=gran_k, use_ue8m0=use_ue8m0)


def _clone(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)

"""Cases of fp8_fp4_gemm, shared by its tests."""

from __future__ import annotations

import dataclasses

import torch

from common import GemmCase, arrange_scales, ceil_div, encode_scales, on_sm100, strided
from gemm_emulation import E2M1, pack_fp4

FP4_DTYPES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)


@dataclasses.dataclass(frozen=True)
class Fp4Case(GemmCase):
    """A GemmCase of ``fp8_fp4_gemm_<layout>``; operands whose type is "fp8" are made as there. With FP4 ``b`` the
    recipe may have four numbers."""

    a: str = "fp8"
    b: str = "fp4"
    fp4_dtype: torch.dtype = torch.uint8

    @property
    def repro(self) -> str:
        return f"{self!r} of test/fp4.py"

    @property
    def op(self) -> str:
        return f"fp8_fp4_gemm_{self.layout}"

    def operand(self, which: str, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if getattr(self, which) == "fp8":
            return super().operand(which, random)
        mn = self.m if which == "a" else self.n
        gran_mn, gran_k = (self.recipe[0], self.recipe[2]) if which == "a" else (self.recipe[1], self.recipe[-1])
        codes = torch.randint(0, 16, (mn, self.k), generator=random)
        packed = strided(pack_fp4(codes), ceil_div(self.k // 2, 32) * 32 + self.pad, self.device, 0x77)
        packed = packed.view(self.fp4_dtype)
        exponents = torch.randint(-2, 3, (ceil_div(mn, gran_mn), ceil_div(self.k, gran_k)), generator=random)
        sf64 = torch.pow(2.0, exponents.double())
        kind = "float32" if self.scales == "random" and on_sm100(self.device) else self.scales
        if kind == "random":
            sf64 = (sf64 * (1 + torch.rand(sf64.shape, generator=random))).float().double()
        rows, groups = torch.arange(mn) // gran_mn, torch.arange(self.k) // gran_k
        dequantised = E2M1[codes] * sf64[rows][:, groups]
        sf = sf64.float() if kind == "random" else encode_scales(exponents, kind, 1)
        return packed, arrange_scales(sf, self.sf_strides, self.device), dequantised

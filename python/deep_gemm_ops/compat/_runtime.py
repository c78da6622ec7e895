"""Scale layouts, settings and initialisation with the public module's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import knobs, layout
from ._names import offer

__all__: list[str] = []

Tensor = torch.Tensor

_ops = torch.ops.deep_gemm


@offer("transform_sf_into_required_layout", needs="transform_sf_into_required_layout")
def transform_sf_into_required_layout(
    sf: Tensor,
    mn: int,
    k: int,
    recipe: Sequence[int],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: Tensor | None = None,
) -> Tensor:
    """Scales as the kernels read them: ``deep_gemm_ops.transform_sf_into_required_layout``.

    With a recipe of three, ``is_sfa`` defaults to False; with one of two it says nothing and is ignored.
    """
    _without_psum("transform_sf_into_required_layout", psum_layout)
    is_sfa = bool(is_sfa) if len(recipe) == 3 else None
    options: dict[str, Any] = {"num_groups": num_groups, "is_sfa": is_sfa, "disable_ue8m0_cast": disable_ue8m0_cast}
    return _ops.transform_sf_into_required_layout(sf, mn, k, list(recipe), **options)


def _without_psum(op: str, psum_layout: Tensor | None) -> None:
    if psum_layout is not None:
        raise RuntimeError(f"{op}: psum_layout has value {tuple(psum_layout.shape)}, expected None")


@offer("get_mn_major_tma_aligned_tensor", "get_col_major_tma_aligned_tensor", needs="get_mn_major_tma_aligned_tensor")
def get_mn_major_tma_aligned_tensor(sf: Tensor) -> Tensor:
    """Scales MN-major with the other stride rounded up to 16 bytes."""
    return _ops.get_mn_major_tma_aligned_tensor(sf)


@offer("get_mn_major_tma_aligned_packed_ue8m0_tensor", needs="get_mn_major_tma_aligned_packed_ue8m0_tensor")
def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: Tensor, psum_layout: Tensor | None = None) -> Tensor:
    """The same, four UE8M0 exponents a word."""
    _without_psum("get_mn_major_tma_aligned_packed_ue8m0_tensor", psum_layout)
    return _ops.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)


@offer(
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
    needs="get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
)
def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: Tensor,
    grouped_layout: Tensor,
    ks_cpu: Sequence[int] | None = None,
    gran_k: int = 128,
    k_alignment: int = 128,
    use_psum_layout: bool = False,
) -> Tensor:
    """The same for several groups along K, whose sizes are read on the device."""
    op = "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor"
    if use_psum_layout:
        raise RuntimeError(f"{op}: use_psum_layout has value True, expected False")
    return getattr(_ops, op)(sf, grouped_layout, gran_k=gran_k)


offer("get_tma_aligned_size")(layout.get_tma_aligned_size)
offer("set_num_sms")(knobs.set_num_sms)
offer("get_num_sms")(knobs.get_num_sms)
offer("set_tc_util")(knobs.set_tc_util)
offer("get_tc_util")(knobs.get_tc_util)
offer("set_pdl")(knobs.set_pdl)
offer("get_pdl")(knobs.get_pdl)
offer("set_block_size_multiple_of")(knobs.set_block_size_multiple_of)
offer("set_mk_alignment_for_contiguous_layout")(knobs.set_mk_alignment_for_contiguous_layout)
offer("get_theoretical_mk_alignment_for_contiguous_layout")(knobs.get_theoretical_mk_alignment_for_contiguous_layout)
offer(
    "get_mk_alignment_for_contiguous_layout",
    "get_m_alignment_for_contiguous_layout",
    "get_k_alignment_for_contiguous_layout",
)(knobs.get_mk_alignment_for_contiguous_layout)


@offer("init")
def init(*_: Any, **__: Any) -> None:
    """Nothing to initialise: kernels are compiled ahead of time."""


@offer("set_ignore_compile_dims")
def set_ignore_compile_dims(ignore: bool = True) -> None:
    """Ignored: no dimension is compiled in."""


@offer("set_compile_mode")
def set_compile_mode(mode: int) -> None:
    """Ignored: nothing is compiled at run time."""


@offer("get_compile_mode")
def get_compile_mode() -> int:
    """0, the mode in which kernels run."""
    return 0


@offer("use_deterministic_algorithms")
def use_deterministic_algorithms(enable: bool = True) -> None:
    """Ignored: every kernel is deterministic."""

"""Layouts of scales and alignments of groups, under the public module's names."""

from __future__ import annotations

from typing import Any

from .._names import exists, lookup

_NAMES = (
    "get_col_major_tma_aligned_tensor",
    "get_k_alignment_for_contiguous_layout",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_tensor",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "get_tma_aligned_size",
    "per_token_cast_to_fp4",
    "set_mk_alignment_for_contiguous_layout",
    "transform_sf_into_required_layout",
)


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return [name for name in _NAMES if exists(name)]
    if name not in _NAMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return lookup(__name__, name)

"""Process-wide knobs of kernel selection and launch.

They apply to launches that follow, on every device and stream; a captured CUDA graph keeps the values it was captured
with. The values live in the shared library, or here where there is none. Set them before capturing or timing, not
from several threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import _capi, _checks

__all__ = [
    "get_block_size_multiple_of",
    "get_mk_alignment_for_contiguous_layout",
    "get_num_sms",
    "get_pdl",
    "get_tc_util",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "set_block_size_multiple_of",
    "set_mk_alignment_for_contiguous_layout",
    "set_num_sms",
    "set_pdl",
    "set_tc_util",
]

# Values while there is no library; with one, they stay unused.
_values: dict[str, int] = {
    "num_sms": 0,
    "tc_util": 100,
    "pdl": 1,
    "mk_alignment": 128,
    "block_m_multiple_of": 1,
    "block_n_multiple_of": 1,
}


def _set(name: str, value: int) -> None:
    if _capi.available():
        _capi.set_knob(name, value)
    else:
        _values[name] = value


def _get(name: str) -> int:
    return _capi.get_knob(name) if _capi.available() else _values[name]


def _positive(op: str, arg: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _checks.fail(op, arg, "value", value, "a positive integer")
    return value


def set_num_sms(num_sms: int) -> None:
    """Let kernels use this many streaming multiprocessors, leaving the rest to others (communication, say).

    Args:
        num_sms: at least 1; more than the device has means all. 0 restores the default, all of them.
    """
    if isinstance(num_sms, bool) or not isinstance(num_sms, int) or num_sms < 0:
        _checks.fail("set_num_sms", "num_sms", "value", num_sms, "an integer of at least 0")
    _set("num_sms", num_sms)


def get_num_sms() -> int:
    """What was set, else the streaming multiprocessors of the current CUDA device, 0 where there is none."""
    value = _get("num_sms")
    if value:
        return value
    import torch

    if not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def set_tc_util(tc_util: float) -> None:
    """Share of the tensor cores' time that kernels should aim for, a limit on power.

    Args:
        tc_util: a ratio, 0 < tc_util <= 1 (0.8), or a percentage, 1 < tc_util <= 100 (80).
    """
    if isinstance(tc_util, bool) or not isinstance(tc_util, (int, float)) or not 0 < tc_util <= 100:
        _checks.fail("set_tc_util", "tc_util", "value", tc_util, "a ratio up to 1 or a percentage up to 100")
    percent = round(tc_util * 100 if tc_util <= 1 else tc_util)
    _set("tc_util", max(percent, 1))


def get_tc_util() -> int:
    """The target of :func:`set_tc_util` in percent, 100 by default."""
    return _get("tc_util")


def set_pdl(enable: bool) -> None:
    """Programmatic dependent launch: let a kernel's prologue overlap the tail of the one before it on the stream."""
    if not isinstance(enable, (bool, int)) or enable not in (0, 1):
        _checks.fail("set_pdl", "enable", "value", enable, "True or False")
    _set("pdl", int(enable))


def get_pdl() -> bool:
    """Whether programmatic dependent launch is on."""
    return bool(_get("pdl"))


def set_mk_alignment_for_contiguous_layout(alignment: int) -> None:
    """Rows (of M, or K elements for k-grouped products) that every group's start is a multiple of, in the "indices"
    and "psum" layouts.

    Args:
        alignment: a positive multiple of 8.
    """
    if _positive("set_mk_alignment_for_contiguous_layout", "alignment", alignment) % 8:
        _checks.fail("set_mk_alignment_for_contiguous_layout", "alignment", "value", alignment, "a multiple of 8")
    _set("mk_alignment", alignment)


def get_mk_alignment_for_contiguous_layout() -> int:
    """The alignment of groups in rows, 128 by default."""
    return _get("mk_alignment")


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """The alignment that suits this device's kernels best.

    Args:
        expected_m: rows of a typical group. SM90 kernels use 128 in any case; on SM100 it is the smallest of 16, 32,
            64 and 128, the heights of tiles, that covers ``expected_m``, 128 where none does or without one.
    """
    if expected_m is not None and (isinstance(expected_m, bool) or not isinstance(expected_m, int) or expected_m < 0):
        name = "get_theoretical_mk_alignment_for_contiguous_layout"
        _checks.fail(name, "expected_m", "value", expected_m, "an integer of at least 0 or None")
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 10:
        return 128
    return next((rows for rows in (16, 32, 64) if expected_m is not None and expected_m <= rows), 128)


def set_block_size_multiple_of(multiple: int | Sequence[int]) -> None:
    """Choose only tiles whose rows and columns are multiples of these.

    Args:
        multiple: one positive integer for BLOCK_M and BLOCK_N, or a pair. 1 allows every tile.
    """
    values = tuple(multiple) if isinstance(multiple, (tuple, list)) else (multiple, multiple)
    if len(values) != 2:
        _checks.fail("set_block_size_multiple_of", "multiple", "length", len(values), 2)
    for value in values:
        _positive("set_block_size_multiple_of", "multiple", value)
    if _capi.available():
        _capi.set_block_size_multiple_of(*values)
    else:
        _values["block_m_multiple_of"], _values["block_n_multiple_of"] = values


def get_block_size_multiple_of() -> tuple[int, int]:
    """(for BLOCK_M, for BLOCK_N), (1, 1) by default."""
    return _get("block_m_multiple_of"), _get("block_n_multiple_of")

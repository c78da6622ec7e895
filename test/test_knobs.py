"""Knobs: what is set is what is read, wherever the value lives, and nonsense is refused."""

# ruff: noqa: E501  (the messages are printed as they are)

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from expecttest import assert_expected_inline

import deep_gemm_ops
from deep_gemm_ops import knobs


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    names = ("num_sms", "tc_util", "pdl", "mk_alignment", "block_m_multiple_of", "block_n_multiple_of")
    before = {name: knobs._get(name) for name in names}
    yield
    for name in names[:4]:
        knobs._set(name, before[name])
    knobs.set_block_size_multiple_of((before["block_m_multiple_of"], before["block_n_multiple_of"]))


@pytest.fixture(params=["library", "python"])
def _where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as installed, once as if there were no library."""
    if request.param == "python":
        monkeypatch.setattr(knobs._capi, "available", lambda: False)


pytestmark = pytest.mark.usefixtures("_where")


def message(function: object, *args: object) -> str:
    with pytest.raises(RuntimeError) as error:
        function(*args)
    return str(error.value)


def test_defaults() -> None:
    assert deep_gemm_ops.get_tc_util() == 100
    assert deep_gemm_ops.get_mk_alignment_for_contiguous_layout() == 128
    assert deep_gemm_ops.get_block_size_multiple_of() == (1, 1)
    assert isinstance(deep_gemm_ops.get_pdl(), bool)
    sms = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 0
    assert deep_gemm_ops.get_num_sms() == sms


def test_num_sms() -> None:
    default = deep_gemm_ops.get_num_sms()
    deep_gemm_ops.set_num_sms(64)
    assert deep_gemm_ops.get_num_sms() == 64
    deep_gemm_ops.set_num_sms(0)
    assert deep_gemm_ops.get_num_sms() == default


@pytest.mark.parametrize(
    ("value", "percent"), [(0.8, 80), (80, 80), (1, 100), (1.0, 100), (100, 100), (2, 2), (0.005, 1)]
)
def test_tc_util_is_a_ratio_or_a_percentage(value: float, percent: int) -> None:
    deep_gemm_ops.set_tc_util(value)
    assert deep_gemm_ops.get_tc_util() == percent


def test_pdl() -> None:
    for value in (False, True, 0, 1):
        deep_gemm_ops.set_pdl(value)
        assert deep_gemm_ops.get_pdl() is bool(value)


def test_mk_alignment() -> None:
    for value in (8, 64, 224):
        deep_gemm_ops.set_mk_alignment_for_contiguous_layout(value)
        assert deep_gemm_ops.get_mk_alignment_for_contiguous_layout() == value


def test_theoretical_mk_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    theoretical = deep_gemm_ops.get_theoretical_mk_alignment_for_contiguous_layout
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert [theoretical(), theoretical(1), theoretical(500)] == [128, 128, 128]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert [theoretical(m) for m in (None, 0, 1, 32, 33, 200, 224, 9999)] == [128, 16, 16, 32, 64, 128, 128, 128]


def test_block_size_multiple_of() -> None:
    deep_gemm_ops.set_block_size_multiple_of(64)
    assert deep_gemm_ops.get_block_size_multiple_of() == (64, 64)
    deep_gemm_ops.set_block_size_multiple_of((128, 16))
    assert deep_gemm_ops.get_block_size_multiple_of() == (128, 16)


def test_nonsense_is_refused_and_changes_nothing() -> None:
    before = {name: knobs._get(name) for name in knobs._values}
    refused = [
        message(deep_gemm_ops.set_num_sms, -1),
        message(deep_gemm_ops.set_num_sms, 2.5),
        message(deep_gemm_ops.set_num_sms, True),
        message(deep_gemm_ops.set_tc_util, 0),
        message(deep_gemm_ops.set_tc_util, 101),
        message(deep_gemm_ops.set_tc_util, float("nan")),
        message(deep_gemm_ops.set_pdl, 2),
        message(deep_gemm_ops.set_mk_alignment_for_contiguous_layout, 0),
        message(deep_gemm_ops.set_mk_alignment_for_contiguous_layout, 100),
        message(deep_gemm_ops.get_theoretical_mk_alignment_for_contiguous_layout, -1),
        message(deep_gemm_ops.set_block_size_multiple_of, (1, 2, 3)),
        message(deep_gemm_ops.set_block_size_multiple_of, (64, 0)),
    ]
    assert_expected_inline("\n".join(refused), """\
set_num_sms: num_sms has value -1, expected an integer of at least 0
set_num_sms: num_sms has value 2.5, expected an integer of at least 0
set_num_sms: num_sms has value True, expected an integer of at least 0
set_tc_util: tc_util has value 0, expected a ratio up to 1 or a percentage up to 100
set_tc_util: tc_util has value 101, expected a ratio up to 1 or a percentage up to 100
set_tc_util: tc_util has value nan, expected a ratio up to 1 or a percentage up to 100
set_pdl: enable has value 2, expected True or False
set_mk_alignment_for_contiguous_layout: alignment has value 0, expected a positive integer
set_mk_alignment_for_contiguous_layout: alignment has value 100, expected a multiple of 8
get_theoretical_mk_alignment_for_contiguous_layout: expected_m has value -1, expected an integer of at least 0 or None
set_block_size_multiple_of: multiple has length 3, expected 2
set_block_size_multiple_of: multiple has value 0, expected a positive integer""")
    assert {name: knobs._get(name) for name in knobs._values} == before

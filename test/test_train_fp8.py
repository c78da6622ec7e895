"""The training example at toy size: FP8 learns what BF16 learns, and the check notices when it does not."""

from __future__ import annotations

import json
import pathlib
import sys
import xml.etree.ElementTree

import pytest
import torch

from deep_gemm_ops.nn import FP8Linear, GroupedExperts, _linear

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import byte_lm  # noqa: E402
import train_fp8  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_fp8_trains_as_bf16_does(device: str, tmp_path: pathlib.Path) -> None:
    """Dense and experts, the same seed: losses agree, curves are drawn, every step is on record."""
    arguments = ["--size", "tiny", "--eval-bytes", "8192", "--device", device]
    files = ["--plot", str(tmp_path / "loss.svg"), "--json", str(tmp_path / "loss.json")]
    outcome = train_fp8.main([*arguments, *files])
    assert outcome["failures"] == []
    assert json.loads((tmp_path / "loss.json").read_text()) == outcome
    for name, modules in (("dense", 8), ("moe", 6)):
        result = outcome["results"][name]
        assert result["fp8_modules"] == modules
        bf16, fp8 = result["bf16"], result["fp8"]
        assert len(bf16["bits"]) == len(fp8["bits"]) == 60
        # The same initial weights and batch, and a head that starts at zero: the first loss is 8 bits in both.
        assert bf16["bits"][0] == pytest.approx(8, abs=1e-3) == fp8["bits"][0]
        assert fp8["bits"] != bf16["bits"]
        assert max(bf16["held_out_bits"], fp8["held_out_bits"]) < outcome["byte_entropy"]
    tree = xml.etree.ElementTree.parse(tmp_path / "loss.svg")
    lines = tree.getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [60] * 4


def test_a_wrong_weight_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _linear.weight_gradient

    def rows_moved(*arguments: object) -> torch.Tensor | None:
        gradient = original(*arguments)
        return None if gradient is None else gradient.roll(1, 0)

    monkeypatch.setattr(_linear, "weight_gradient", rows_moved)
    arguments = ["--size", "tiny", "--only", "dense", "--steps", "40", "--eval-bytes", "8192", "--device", "cpu"]
    failures = train_fp8.main(arguments)["failures"]
    assert any("dense: FP8 changes the held out loss by" in failure for failure in failures)


def test_conversion_leaves_head_and_routers() -> None:
    model = train_fp8.to_fp8(byte_lm.ByteLM(byte_lm.QUICK, train_fp8.ExpertBlock))
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["head"] is torch.nn.Linear is kinds["blocks.0.router"]
    assert kinds["blocks.1.qkv"] is kinds["blocks.0.proj"] is FP8Linear
    assert kinds["blocks.0.experts"] is GroupedExperts


def test_plain_experts_are_the_same_function() -> None:
    """What the FP8 experts are compared with computes the same."""
    torch.manual_seed(0)
    plain = train_fp8.PlainExperts(96, 64, 4)
    x, weights = torch.randn(50, 96), torch.rand(50, 2)
    ids = torch.randint(0, 4, (50, 2))
    expected = plain(x, ids, weights)
    plain.__class__ = GroupedExperts
    actual = plain(x, ids, weights)
    assert 0 < float(((actual - expected).norm() / expected.norm()).detach()) < 0.08

"""The examples at toy sizes: what they print and compute, and that they fail when something is wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import deep_gemm_ops

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import byte_lm  # noqa: E402
import decoder_block  # noqa: E402
import demo  # noqa: E402
import serve_decode  # noqa: E402
from fp8_linear import Fp8Linear, dequantise, quantise_linears  # noqa: E402
from terminal import Checks, Progress, print_table  # noqa: E402


def path_of_package() -> str:
    """PYTHONPATH under which a new process finds the package that this one tests, installed or not."""
    here = str(pathlib.Path(deep_gemm_ops.__file__).parent.parent)
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """Output and results of the whole demo, run as a user runs it."""
    path = tmp_path_factory.mktemp("demo") / "results.json"
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--device", "cpu", "--json", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path_of_package()},
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, json.loads(path.read_text())


def test_demo_says_what_it_ran_on(quick_demo: tuple[str, dict]) -> None:
    output, _ = quick_demo
    assert "CPU asked for: everything runs on the CPU reference" in output
    assert "no speed is measured" in output
    assert output.rstrip().endswith("all checks passed.")


def test_decoder_block_layers_are_within_their_bars(quick_demo: tuple[str, dict]) -> None:
    result = quick_demo[1]["decoder"]
    assert [layer["name"] for layer in result["layers"]] == list(decoder_block.LAYERS)
    for layer in result["layers"]:
        # Above zero too: a check that compared a tensor with itself would pass with 0.
        assert 0 < layer["error"] <= 4e-3, layer
        assert layer["error"] <= layer["tile_error"] <= 8e-3, layer
        assert 0.01 < layer["bf16_difference"] <= decoder_block.QUANTISATION_BAR, layer
    assert 0 < result["block_difference"] <= decoder_block.BLOCK_BAR


def test_decoder_block_ran_several_batches_on_one_graph(quick_demo: tuple[str, dict]) -> None:
    output, results = quick_demo
    assert len(set(results["decoder"]["tokens"])) >= 3
    assert "batches of 19, 40, 6 tokens: no recompilation" in output


def test_full_scale_is_deepseek_v3() -> None:
    with torch.device("meta"):
        block = decoder_block.DecoderBlock(decoder_block.BlockShape.scaled(1))
    shapes = {name: tuple(getattr(block, name).weight.shape) for name in decoder_block.LAYERS}
    assert shapes == {
        "q_a": (1536, 7168),
        "q_b": (24576, 1536),
        "kv_a": (576, 7168),
        "kv_b": (32768, 512),
        "o_proj": (7168, 16384),
        "gate_up": (4096, 7168),
        "down": (7168, 2048),
    }


def test_language_model_loses_less_than_one_percent_in_fp8(quick_demo: tuple[str, dict]) -> None:
    output, results = quick_demo
    result = results["lm"]
    assert result["bf16_bits"] < result["byte_entropy"] < 8
    assert result["fp8_bits"] != result["bf16_bits"]
    assert abs(result["fp8_bits"] - result["bf16_bits"]) <= 0.01 * result["bf16_bits"]
    assert result["fp8_layers"] == 4 * result["config"]["layers"] + 1
    assert len(result["samples"]["bf16"]) == len(result["samples"]["fp8"]) == 32
    assert f"BF16 {result['bf16_bits']:.4f}    FP8 {result['fp8_bits']:.4f}" in output


def test_held_out_split_repeats_and_does_not_overlap() -> None:
    training, held_out, files, held_out_files = byte_lm.read_text()
    again = byte_lm.read_text()
    assert torch.equal(training, again[0]) and torch.equal(held_out, again[1])
    assert 0 < held_out_files < files / 10
    probe = bytes(held_out[1000:1200].tolist())
    assert probe not in bytes(training.numpy())


def small_block(seed: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    shape = decoder_block.BlockShape(hidden=256, heads=2, q_rank=64, kv_rank=64, mlp=128)
    bf16 = decoder_block.make_block(shape, torch.device("cpu"), seed)
    return bf16, quantise_linears(decoder_block.make_block(shape, torch.device("cpu"), seed))


def check_one_batch(bf16: torch.nn.Module, fp8: torch.nn.Module, spoil: str | None = None) -> list[str]:
    results = {
        name: decoder_block.LayerResult(name, *getattr(bf16, name).weight.shape) for name in decoder_block.LAYERS
    }
    checks = Checks()
    with torch.no_grad():
        _, trace = fp8(*decoder_block.make_batch(70, bf16.shape, torch.device("cpu"), 3))
        if spoil:
            trace[spoil][1][64:, :8] *= 1.05
        decoder_block.check_layers(results, trace, bf16, fp8, checks)
    return checks.failures


def test_layer_check_notices_a_small_error_in_one_tile() -> None:
    bf16, fp8 = small_block(5)
    assert check_one_batch(bf16, fp8) == []
    (failure,) = check_one_batch(bf16, fp8, spoil="o_proj")
    assert "o_proj with 70 tokens" in failure and "a tile is wrong" in failure


def test_layer_check_notices_a_wrong_weight() -> None:
    bf16, fp8 = small_block(6)
    fp8.down = Fp8Linear(bf16.down.weight.roll(1, 0))
    failures = check_one_batch(bf16, fp8)
    assert any("down with 70 tokens differs from BF16" in failure for failure in failures)


def test_a_recompilation_fails_the_decoder_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def specialising(layer: Fp8Linear, x: torch.Tensor) -> torch.Tensor:
        return original(layer, x) if x.shape[0] != 40 else -original(layer, x)

    original = Fp8Linear.forward
    monkeypatch.setattr(Fp8Linear, "forward", specialising)
    monkeypatch.setattr(decoder_block, "pick_backend", lambda device: ("eager", "not compiled"))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="recompile"):
        decoder_block.main(["--quick", "--device", "cpu"])
    torch._dynamo.reset()


def test_demo_exits_with_one_when_a_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(byte_lm, "LOSS_BAR", -1.0)
    monkeypatch.setattr(byte_lm, "QUICK", byte_lm.Config(dim=48, layers=1, heads=3, context=16, batch=4))
    assert demo.main(["--only", "lm", "--quick", "--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "CHECK FAILED: FP8 changes the held-out loss" in output
    assert output.rstrip().endswith("1 checks FAILED.")


def test_serve_decode(capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths that cross a block of the cache, requests that end and start, experts with no token and with all."""
    torch._dynamo.reset()
    results = serve_decode.main(["--quick", "--device", "cpu"])
    torch._dynamo.reset()
    output = capsys.readouterr().out
    assert results["failures"] == []
    assert "CPU asked for" in output and "No CUDA graph is captured" in output
    assert output.rstrip().endswith("4 of 4 checks passed")
    assert results["lengths"][1] > serve_decode.BLOCK_KEYS
    assert results["requests"] > results["config"]["sequences"]
    assert results["loads"] == [0, 4]
    assert results["differences"]["compiled"] < 1e-6
    assert 0.01 < results["differences"]["plain FP32"] < serve_decode.FP8_BAR


def test_serve_decode_notices_a_wrong_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        serve_decode,
        "compiled_function",
        lambda model, *_: lambda tokens, lengths, tables: model(tokens, (lengths - 1).clamp(min=0), tables),
    )
    (failure,) = serve_decode.main(["--quick", "--device", "cpu", "--steps", "8"])["failures"]
    assert "compiled: logits differ by" in failure


def test_serve_decode_does_not_depend_on_where_blocks_lie() -> None:
    config = dataclasses.replace(serve_decode.QUICK, steps=70, layers=1)
    model, _ = serve_decode.build(config, torch.device("cpu"), 0)
    plan = serve_decode.Plan.make(config, 0)
    tables = torch.arange(config.sequences * config.context // serve_decode.BLOCK_KEYS, dtype=torch.int32)
    in_order = dataclasses.replace(plan, block_tables=tables.view(1, config.sequences, -1).expand(config.steps, -1, -1))
    assert not torch.equal(plan.block_tables, in_order.block_tables)
    runs = [serve_decode.serve(model, model, p) for p in (plan, in_order)]
    assert torch.equal(runs[0].tokens, runs[1].tokens) and torch.equal(runs[0].logits, runs[1].logits)


def test_serve_decode_from_captured_graphs(cuda: str) -> None:
    results = serve_decode.main(["--device", cuda, "--steps", "80"])
    assert results["failures"] == []
    assert results["differences"]["captured"] == 0
    assert results["step_us"]["captured"] < results["step_us"]["eager"]


def test_fp8_linear_keeps_leading_dimensions_and_dequantises_to_its_weight() -> None:
    weight = torch.randn(200, 144, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = Fp8Linear(weight)
    assert layer(torch.randn(2, 3, 144).bfloat16()).shape == (2, 3, 200)
    stored = dequantise(layer.weight, layer.weight_sf, gran_mn=128)
    assert 0.01 < decoder_block.relative(stored, weight) < 0.04


def test_quantise_linears_refuses_a_bias() -> None:
    with pytest.raises(ValueError, match="first has a bias, expected none"):
        quantise_linears(torch.nn.ModuleDict({"first": torch.nn.Linear(16, 16)}))


def test_progress_without_terminal_prints_a_last_line() -> None:
    stream = io.StringIO()
    progress = Progress("working", stream)
    progress.update(0.5, "half")
    progress.close("done")
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("working 100%") and line.endswith("done")


def test_progress_on_a_terminal_redraws_one_line() -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    progress = Progress("working", stream)
    progress._interval = 0.0
    progress.update(0.5, "half")
    progress.close()
    assert stream.getvalue().count("\r") == 2
    assert "[############............] working  50%" in stream.getvalue()
    assert stream.getvalue().endswith("\n") and stream.getvalue().count("\n") == 1


def test_table_aligns_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["layer", "us"], [["q_a", "1.5"], ["gate_up", "12.0"]])
    assert capsys.readouterr().out == "layer      us\n-------  ----\nq_a       1.5\ngate_up  12.0\n"


def test_readme_example_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)
    code = code.replace("torch.compile(", 'torch.compile(backend="eager", ')  # Inductor's time is spent above
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "(100, 4096), relative difference from BF16 0.037\n"

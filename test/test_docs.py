"""The documentation does what it says: the tutorial runs, and the operators' page is that of this registry."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from deep_gemm_ops import mega_moe

from common import ROOT


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)


def run_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs a page's blocks one after the other in one scope, as a reader would."""
    compile_ = torch.compile
    # The tests of the layers spend Inductor's time; here the graph has to be whole, which Dynamo alone decides.
    monkeypatch.setattr(torch, "compile", lambda *args, **keywords: compile_(*args, **{"backend": "eager", **keywords}))
    torch._dynamo.reset()
    scope: dict[str, Any] = {"__name__": "tutorial"}
    for number, block in enumerate(python_blocks(name)):
        exec(compile(block, f"docs/{name}, block {number}", "exec"), scope)
    torch._dynamo.reset()
    return scope


def test_tutorial(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = run_blocks("tutorial.md", monkeypatch)
    assert scope["last"] < 0.7 * scope["first"]
    assert len(python_blocks("tutorial.md")) >= 8


def test_scaled_mm_page(monkeypatch: pytest.MonkeyPatch) -> None:
    run_blocks("scaled_mm.md", monkeypatch)


def tool(name: str) -> ModuleType:
    """A script in tools/."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def test_mega_moe_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its example runs, what it says of a buffer's size is so, and its picture is what the script draws."""
    scope = run_blocks("mega_moe.md", monkeypatch)
    assert scope["y"].shape == (40, 256) and scope["y"].isfinite().all() and scope["y"].any()
    layouts = {t: mega_moe.LayerShape(8, 256, 4096, 8, 7168, 2048, t).buffer_layout() for t in mega_moe.MMA_TYPES}
    fp8, fp4, bf16 = (f"{layouts[t].bytes / 1e9:.2f} GB" for t in ("fp8xfp8", "fp8xfp4", "bf16xbf16"))
    combine = (layouts["fp8xfp8"].counts - layouts["fp8xfp8"].combine) / 1e9
    sizes = f"{fp8}, of which the combine\nbuffer is {combine:.2f} GB; beside FP4 weights {fp4}, with BF16 {bf16}."
    assert sizes in (ROOT / "docs" / "mega_moe.md").read_text()
    assert (ROOT / "docs" / "mega_moe.svg").read_text() == tool("draw_mega_moe").draw(), "run tools/draw_mega_moe.py"


def test_operators_page_is_current() -> None:
    """The page is what its script makes: schemas, docstrings, and the results and messages of calls that are run."""
    make_operator_docs = tool("make_operator_docs")
    assert (ROOT / "docs" / "operators.md").read_text() == make_operator_docs.page(), "run tools/make_operator_docs.py"

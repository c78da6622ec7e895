"""Compiles an FP8 model into an AOTInductor package that ``run_package`` runs from C++, without Python.

    python examples/aoti/make_package.py build/aoti
    build/aoti/run_package python/deep_gemm_ops/libdeep_gemm_ops.so build/aoti/model.pt2 build/aoti/cases.pt

The model is a block with an FP8 MLP and FP8 experts, quantised once by ``freeze``; any number of tokens. On a machine
without a GPU the package is compiled for the CPU. Its operators have no implementation there but the reference, which
is Python's, so that only a process with Python can run it: ``run_package`` then says which operator it misses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from deep_gemm_ops.export import aoti_compile_and_package
from deep_gemm_ops.nn import FP8Linear, GroupedExperts, freeze

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fp8_linear import pick_device  # noqa: E402


class Block(nn.Module):
    """An MLP and a layer of experts, both with a residual."""

    def __init__(self, dim: int = 256, hidden: int = 512, experts: int = 4) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.gate_up = FP8Linear(dim, 2 * hidden, bias=False)
        self.down = FP8Linear(hidden, dim)
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = GroupedExperts(dim, hidden, experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(self.norms[0](x)).chunk(2, dim=-1)
        x = x + self.down(F.silu(gate) * up)
        h = self.norms[1](x)
        weights, ids = self.router(h).softmax(-1).topk(2)
        return x + self.experts(h, ids, weights)


def write(model: nn.Module, inputs: Sequence[torch.Tensor], folder: Path) -> None:
    """``model.pt2``, for any size of the input's first dimension, and ``cases.pt``: inputs and results of ``model``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = torch.export.Dim("tokens", min=2)
    with torch.no_grad():
        program = torch.export.export(model, (inputs[0],), dynamic_shapes=({0: tokens},))
        aoti_compile_and_package(program, package_path=folder / "model.pt2")
        torch.save([t.cpu() for x in inputs for t in (x, model(x))], folder / "cases.pt")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the package and the cases."""
    parser = argparse.ArgumentParser(description="an AOTInductor package of an FP8 model")
    parser.add_argument("folder", type=Path, help="where model.pt2 and cases.pt are written")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    device, why = pick_device(args.device)
    print(f"{why}.")
    torch.manual_seed(0)
    model = freeze(Block()).to(device, torch.bfloat16).eval()
    write(model, [torch.randn(n, 256, dtype=torch.bfloat16, device=device) for n in (64, 7, 300)], args.folder)
    print(f"written: {args.folder / 'model.pt2'}, {args.folder / 'cases.pt'}")


if __name__ == "__main__":
    main()

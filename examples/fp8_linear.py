"""A linear layer on the operators, as a user would write it, and the device the examples run on.

The weight is quantised once, in 128 x 128 blocks; activations are quantised in each call, one scale per token and 128
elements of K. Both operators have fakes, so the module compiles with ``fullgraph=True`` and dynamic shapes as it is.
"""

from __future__ import annotations

import torch
from torch import nn

import deep_gemm_ops  # noqa: F401  (importing it registers torch.ops.deep_gemm)


class Fp8Linear(nn.Module):
    """``y = x @ weight.T``: BF16 in, BF16 out, FP8 operands inside, no bias.

    Args:
        weight: ``[N, K]`` BF16, K a multiple of 16 (FP8 rows start at multiples of 16 bytes).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        values, scales = torch.ops.deep_gemm.per_block_cast_to_fp8(weight.detach())
        self.register_buffer("weight", values)  # [N, K] float8_e4m3fn
        self.register_buffer("weight_sf", scales)  # [ceil(N / 128), ceil(K / 128)] float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., K]`` BF16 to ``[..., N]`` BF16."""
        values, scales = torch.ops.deep_gemm.per_token_cast_to_fp8(x.reshape(-1, x.shape[-1]))
        y = torch.ops.deep_gemm.fp8_gemm_nt(values, scales, self.weight, self.weight_sf)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def quantise_linears(module: nn.Module) -> nn.Module:
    """Replace every bias-free ``nn.Linear`` inside ``module`` by an :class:`Fp8Linear` and return ``module``."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            if child.bias is not None:
                raise ValueError(f"quantise_linears: {name} has a bias, expected none")
            setattr(module, name, Fp8Linear(child.weight))
        else:
            quantise_linears(child)
    return module


def dequantise(values: torch.Tensor, scales: torch.Tensor, gran_mn: int, gran_k: int = 128) -> torch.Tensor:
    """The float64 matrix that FP8 ``values [MN, K]`` and their ``scales`` stand for."""
    mn, k = values.shape
    scales = scales.double().repeat_interleave(gran_mn, 0)[:mn].repeat_interleave(gran_k, 1)[:, :k]
    return values.float().double() * scales


def pick_device(wanted: str = "auto") -> tuple[torch.device, str]:
    """The device to run on and a sentence that says why.

    ``auto`` is the GPU where there is one the library has GEMM kernels for, the CPU reference otherwise.
    """
    reference = "everything runs on the CPU reference, which defines the results; no speed is measured"
    if wanted == "cpu":
        return torch.device("cpu"), f"CPU asked for: {reference}"
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise SystemExit("--device cuda: PyTorch sees no CUDA device")
        return torch.device("cpu"), f"No GPU here: {reference}"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    built = torch._C._dispatch_has_kernel_for_dispatch_key("deep_gemm::fp8_gemm_nt", "CUDA")
    if wanted == "cuda" or (built and capability == (9, 0)):
        return torch.device("cuda"), f"Running on {name}"
    lack = f"there are no GEMM kernels for sm_{capability[0]}{capability[1]} yet" if built else "built without kernels"
    return torch.device("cpu"), f"{name} found, but {lack}: {reference}"

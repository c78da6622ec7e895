"""Which of the public module's names there are: a name exists where the operators behind it do.

Looked up at every access, so names appear by themselves as soon as their operators are registered. Nothing here
initialises CUDA.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch

from .. import _capi

__all__: list[str] = []


#: Operators whose kernels are compiled for every architecture; those of all others follow the table of products.
_FOR_EVERY_ARCHITECTURE = re.compile(r"cast_to|^get_(mn|k_grouped)|^trans|^expand")


@dataclasses.dataclass(frozen=True)
class Entry:
    value: Any
    needs: tuple[str, ...]


ENTRIES: dict[str, Entry] = {}


def offer(*names: str, needs: str | tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Put a function behind ``names``; ``needs`` are the operators that it calls."""

    def register(function: Callable) -> Callable:
        for name in names:
            ENTRIES[name] = Entry(function, (needs,) if isinstance(needs, str) else needs)
        return function

    return register


def works(op: str) -> bool:
    """Whether ``torch.ops.deep_gemm.<op>`` has a kernel for this machine's devices.

    With a GPU that is a CUDA kernel, of its architecture where PyTorch has initialised CUDA and can tell (asking
    would initialise it). Without one the CPU reference counts.
    """
    key = "CUDA" if torch.cuda.device_count() else "CPU"
    name = f"deep_gemm::{op}"
    if not (torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)):
        return False
    if key == "CPU" or _FOR_EVERY_ARCHITECTURE.search(op) or not torch.cuda.is_initialized():
        return True
    major, _ = torch.cuda.get_device_capability()
    if "mega_moe" in op and major != 9:
        return False
    return any(f"sm_{major}0" in row["arch"] for row in _capi.instances(None))


def exists(name: str) -> bool:
    return name in ENTRIES and all(works(op) for op in ENTRIES[name].needs)


def lookup(module: str, name: str) -> Any:
    """What ``module.name`` is, AttributeError where that is nothing."""
    if not exists(name):
        entry = ENTRIES.get(name)
        why = f": there is no kernel for {', '.join(entry.needs)} here" if entry else ""
        raise AttributeError(f"module '{module}' has no attribute '{name}'{why}")
    return ENTRIES[name].value


def present() -> list[str]:
    return sorted(name for name in ENTRIES if exists(name))

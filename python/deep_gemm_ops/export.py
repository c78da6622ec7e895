"""AOTInductor packages of exported programs, for serving from C++ without Python.

``torch._inductor.aoti_compile_and_package`` writes an argument that was left at its schema's default into the package
as that default is stored, and of a dtype a number is stored. The loader refuses a number where it expects a dtype, so
programs with operators of this library are compiled, but do not load (PyTorch 2.13).
:func:`aoti_compile_and_package` writes such arguments out before.

PyTorch 2.11's loader takes the number of a dtype in the package, which is that of ``torch.export``'s schema, for the
number that C++ has for it: bfloat16 became quint8. There the package gets C++'s.

Inductor sorts by a kernel for up to 512 elements where the example's size allows it, and a package with a dynamic size
then sorts the first 512 of more, too (PyTorch 2.11 on an H200; experts sort their tokens). Here it sorts by PyTorch's
operator.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch._export.serde import serialize
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass

from ._library import NAMESPACE

__all__ = ["aoti_compile_and_package"]

_OPTION = "post_grad_custom_post_pass"

# c10::ScalarType of the operators' results.
_CPP_DTYPES = {torch.float32: 6, torch.bfloat16: 15}


def _dtypes_as_loaded() -> contextlib.AbstractContextManager[Any]:
    """While packages are written: numbers of dtypes as this PyTorch's loader takes them."""
    if torch.__version__ >= (2, 12):
        return contextlib.nullcontext()
    return mock.patch.dict(serialize._TORCH_TO_SERIALIZE_DTYPE, _CPP_DTYPES)


def _sorts_any_length(program: torch.export.ExportedProgram) -> contextlib.AbstractContextManager[Any]:
    """While a program with dynamic sizes is compiled: no Triton kernels that sort."""
    if not program.range_constraints:
        return contextlib.nullcontext()
    return mock.patch.object(ir.Sort, "create", lambda *_, dtypes, **__: [None] * len(dtypes))


class _WriteOutDtypes(CustomGraphPass):
    """Gives each of the library's operators the dtype that it has by default as an explicit argument."""

    def __init__(self, following: Callable[[torch.fx.Graph], None] | None) -> None:
        self.following = following

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != NAMESPACE:
                continue
            for argument in node.target._schema.arguments:
                if str(argument.real_type) == "ScalarType" and argument.name not in node.kwargs:
                    # The only dtypes that operators take are those of their results.
                    node.update_kwarg(argument.name, node.meta["val"].dtype)
        if self.following is not None:
            self.following(graph)

    def uuid(self) -> Any:
        return __name__, self.following.uuid() if isinstance(self.following, CustomGraphPass) else self.following


def aoti_compile_and_package(
    program: torch.export.ExportedProgram,
    *,
    package_path: str | os.PathLike[str] | None = None,
    inductor_configs: dict[str, Any] | None = None,
) -> str:
    """``torch._inductor.aoti_compile_and_package`` for programs with operators of this library.

    Args:
        program: what ``torch.export.export`` returns, of a model that is made of the library's operators and PyTorch's
            alone, such as one that ``nn.freeze`` has been applied to: there is no Python where the package runs.
        package_path: the file to write, ending in ".pt2".
        inductor_configs: Inductor's options.

    Returns:
        The path of the package. ``AOTIModelPackageLoader`` runs it from C++ in any process that has loaded
        ``libdeep_gemm_ops.so``, which lies in the package's folder: see ``examples/aoti``.
    """
    configs = dict(inductor_configs or {})
    configs[_OPTION] = _WriteOutDtypes(configs.get(_OPTION))
    path = None if package_path is None else os.fspath(package_path)
    with _dtypes_as_loaded(), _sorts_any_length(program):
        return torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=configs)

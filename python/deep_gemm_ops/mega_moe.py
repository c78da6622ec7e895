"""Mega MoE: the whole expert layer of a mixture of experts, ranks included, as one operator.

Everything of this family: buffers, weights, public functions, checks, specification, fake and CPU implementation.
Importing the module registers the last two. The protocol between the ranks: docs/mega_moe.md.
"""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
import time
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import _checks, reference
from ._checks import fail
from ._cpu import _cpu
from ._fakes import _fake
from .fp8_fp4_gemm import expand_fp4
from .fused_casts import silu
from .layout import align
from .ops import _refuse_grad

__all__ = [
    "SymmBuffer",
    "bf16_mega_moe",
    "fp8_fp4_mega_moe",
    "fp8_mega_moe",
    "get_symm_buffer_for_mega_moe",
    "transform_weights_for_mega_moe",
]

Tensor = torch.Tensor
ScaledWeights = tuple[Tensor, Tensor]

MAX_RANKS = 128
MAX_LOCAL_EXPERTS = 512
DEFAULT_TIMEOUT_MS = 60_000
#: Gates and ups alternate in groups of so many rows.
INTERLEAVE = 8
#: Types of tokens and weights, each of one operator, in the order of MegaMoeType in src/device/mega_moe_params.h.
MMA_TYPES = ("fp8xfp8", "bf16xbf16", "fp8xfp4")
_MMA_TYPE_OF = {"fp8_mega_moe": "fp8xfp8", "bf16_mega_moe": "bf16xbf16", "fp8_fp4_mega_moe": "fp8xfp4"}
_GRAN_K = 128  # elements of K that share a scale, or four scales in a word
_HEADER_BYTES = 1024 + 8 * MAX_RANKS + 4 * MAX_RANKS


# ---------------------------------------------------------------------------------------------------------------------
# A rank's buffer


class BufferLayout(NamedTuple):
    """Where things are in a rank's buffer, bytes from its beginning: MegaMoeOffsets of src/device/mega_moe_params.h."""

    x: int
    x_sf: int
    topk_idx: int
    topk_weights: int
    combine: int
    counts: int
    dispatched: int
    activated: int
    sources: int
    pool_weights: int
    pool_x: int
    pool_x_sf: int
    pool_h: int
    pool_h_sf: int
    bytes: int


class LayerShape(NamedTuple):
    """The sizes that all ranks have in common."""

    num_ranks: int
    num_experts: int
    max_tokens: int
    topk: int
    hidden: int
    intermediate: int
    mma_type: str

    @property
    def is_bf16(self) -> bool:
        return self.mma_type == "bf16xbf16"

    @property
    def is_fp4(self) -> bool:
        """Weights are FP4; they and the tokens have UE8M0 scales per 32 of K."""
        return self.mma_type == "fp8xfp4"

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    def buffer_layout(self) -> BufferLayout:
        min_block, max_block = 16, 128  # tokens of a block, of all kernels
        experts, element, scale = self.local_experts, 2 if self.is_bf16 else 1, 0 if self.is_bf16 else 4
        tokens, expert_rows = self.max_tokens, self.num_ranks * self.max_tokens
        choices = expert_rows * min(self.topk, experts)
        pool = align(choices + experts * (max_block - 1), max_block)
        blocks = choices // min_block + experts
        pool_element = 2 if self.is_fp4 else element  # SM90 has BF16 there
        groups, groups_h = self.hidden // _GRAN_K, self.intermediate // _GRAN_K
        sizes = [
            _HEADER_BYTES,
            tokens * self.hidden * element,
            tokens * groups * scale,
            tokens * self.topk * 8,
            tokens * self.topk * 4,
            tokens * self.topk * self.hidden * 2,
            experts * 4,
            blocks * 4,
            blocks * 4,
            experts * expert_rows * 8,
            pool * 4,
            pool * self.hidden * pool_element,
            pool * groups * scale,
            pool * self.intermediate * pool_element,
            pool * groups_h * scale,
        ]
        offsets, end = [], 0
        for size in sizes:
            end += align(size, 1024)
            offsets.append(end)
        return BufferLayout(*offsets)


class _Views(NamedTuple):
    """What callers write, and what ranks write for one another, as tensors on a buffer's memory."""

    x: Tensor
    x_sf: Tensor | None
    topk_idx: Tensor
    topk_weights: Tensor
    combine: Tensor


def _view(buffer: Tensor, offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    return buffer[offset : offset + size].view(dtype).view(shape)


def _views(buffer: Tensor, shape: LayerShape) -> _Views:
    at, tokens = shape.buffer_layout(), shape.max_tokens
    dtype = torch.bfloat16 if shape.is_bf16 else torch.float8_e4m3fn
    scale = torch.int32 if shape.is_fp4 else torch.float32
    return _Views(
        _view(buffer, at.x, dtype, tokens, shape.hidden),
        None if shape.is_bf16 else _view(buffer, at.x_sf, scale, tokens, shape.hidden // _GRAN_K),
        _view(buffer, at.topk_idx, torch.int64, tokens, shape.topk),
        _view(buffer, at.topk_weights, torch.float32, tokens, shape.topk),
        _view(buffer, at.combine, torch.bfloat16, tokens, shape.topk, shape.hidden),
    )


def _check_sizes(op: str, shape: LayerShape) -> None:
    """What buffers and kernels can hold."""
    if not 1 <= shape.num_ranks <= MAX_RANKS:
        fail(op, "buffer_ptrs", "length", shape.num_ranks, f"1 to {MAX_RANKS}")
    experts = shape.num_experts
    if not (experts >= shape.num_ranks and experts % shape.num_ranks == 0):
        fail(op, "num_experts", "value", experts, f"a positive multiple of the {shape.num_ranks} ranks")
    if not shape.local_experts <= MAX_LOCAL_EXPERTS:
        fail(op, "num_experts", "value", experts, f"at most {MAX_LOCAL_EXPERTS} for each rank")
    if not shape.max_tokens >= 1:
        fail(op, "num_max_tokens_per_rank", "value", shape.max_tokens, "a positive integer")
    if not 1 <= shape.topk <= experts:
        fail(op, "num_topk", "value", shape.topk, "1 to num_experts")
    for arg, size in (("hidden", shape.hidden), ("intermediate_hidden", shape.intermediate)):
        if not (size >= _GRAN_K and size % _GRAN_K == 0):
            fail(op, arg, "value", size, f"a positive multiple of {_GRAN_K}")
    rows = shape.num_ranks * shape.max_tokens * shape.topk + shape.local_experts * 128
    if not rows <= _checks.MAX_SIZE:
        fail(op, "num_max_tokens_per_rank", "value", shape.max_tokens, "fewer than 2^31 rows in all")


class SymmBuffer:
    """A rank's memory for Mega MoE, which its peers reach: inputs, results of experts, and this rank's workspace.

    Write the inputs of a call into the first rows of ``x`` (float8_e4m3fn ``[num_max_tokens_per_rank, hidden]``, or
    bfloat16), ``x_sf`` (``[.., hidden / 128]``: float32, with FP4 weights int32, four UE8M0 scales per 32 elements in a
    word; absent with bfloat16), ``topk_idx`` (int64 ``[.., num_topk]``, the expert among those of all ranks, -1 where a
    choice is masked; the experts of a token differ) and ``topk_weights`` (float32 ``[.., num_topk]``). A call leaves
    everything else ready for the next one.

    ``buffer`` is the uint8 memory itself, ``handle.buffer_ptrs`` has the addresses of all ranks' buffers. A buffer is
    made by :func:`get_symm_buffer_for_mega_moe`, or by :meth:`in_one_process`.
    """

    def __init__(self, buffer: Tensor, handle: Any, rank: int, group: Any, shape: LayerShape) -> None:
        self.buffer: Tensor | None = buffer
        self.handle = handle
        self.rank = rank
        self.group = group
        self.shape = shape
        self.num_experts = shape.num_experts
        self.num_max_tokens_per_rank = shape.max_tokens
        self.num_topk = shape.topk
        self.hidden = shape.hidden
        self.intermediate_hidden = shape.intermediate
        self.mma_type = shape.mma_type
        views = _views(buffer, shape)
        self.x: Tensor | None = views.x
        self.x_sf: Tensor | None = views.x_sf
        self.topk_idx: Tensor | None = views.topk_idx
        self.topk_weights: Tensor | None = views.topk_weights

    @staticmethod
    def in_one_process(
        num_ranks: int,
        num_experts: int,
        num_max_tokens_per_rank: int,
        num_topk: int,
        hidden: int,
        intermediate_hidden: int,
        mma_type: str = "fp8xfp4",
        device: torch.device | str = "cuda",
    ) -> list[SymmBuffer]:
        """Buffers of several ranks that one process plays, each on a stream or thread of its own, on one device.

        On a GPU every rank needs a share of the SMs (``set_num_sms``), because their kernels wait for one another, and
        the kernel has to be loaded before, by a call for one rank alone.
        """
        shape = LayerShape(
            num_ranks,
            num_experts,
            num_max_tokens_per_rank,
            num_topk,
            hidden,
            intermediate_hidden,
            _checked_mma_type("SymmBuffer", mma_type),
        )
        _check_sizes("SymmBuffer", shape)
        size = shape.buffer_layout().bytes
        buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(num_ranks)]
        handle = types.SimpleNamespace(buffer_ptrs=[buffer.data_ptr() for buffer in buffers], keep=buffers)
        return [SymmBuffer(buffer, handle, rank, None, shape) for rank, buffer in enumerate(buffers)]

    def destroy(self) -> None:
        """Lets go of the memory. All ranks have to be done with it."""
        self.handle = self.buffer = self.group = None
        self.x = self.x_sf = self.topk_idx = self.topk_weights = None


def _checked_mma_type(op: str, mma_type: str) -> str:
    if mma_type not in MMA_TYPES:
        fail(op, "mma_type", "value", mma_type, _checks.one_of(MMA_TYPES))
    return mma_type


def _shared_memory(group: Any, size: int) -> tuple[Tensor, Any]:
    """On the CPU: a file for each rank's buffer, which all processes of a group map."""
    import torch.distributed as dist

    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    file, path = tempfile.mkstemp(prefix="deep_gemm_mega_moe_", dir=folder)
    os.close(file)
    try:
        os.truncate(path, size)
        paths: list[str] = [""] * group.size()
        dist.all_gather_object(paths, path, group=group)
        tensors = [torch.from_file(other, shared=True, size=size, dtype=torch.uint8) for other in paths]
        dist.barrier(group=group)  # all have mapped all
    finally:
        os.unlink(path)
    handle = types.SimpleNamespace(buffer_ptrs=[tensor.data_ptr() for tensor in tensors], keep=tensors)
    return tensors[group.rank()], handle


def get_symm_buffer_for_mega_moe(
    group: Any,
    num_experts: int,
    num_max_tokens_per_rank: int,
    num_topk: int,
    hidden: int,
    intermediate_hidden: int,
    use_fp8_dispatch: bool | None = None,
    mma_type: str = "fp8xfp4",
    activation: str = "swiglu",
    *,
    device: torch.device | str = "cuda",
) -> SymmBuffer:
    """This rank's buffer of a layer whose experts are shared out evenly among the ranks of ``group``.

    Args:
        group: a process group, all of whose ranks call this with the same sizes; None is a group of one rank, which
            needs no ``torch.distributed``.
        num_experts: of all ranks, a multiple of their number; rank r owns those from ``r * num_experts / ranks`` on.
        num_max_tokens_per_rank: no call has more tokens than that.
        num_topk: experts that a token chooses.
        hidden, intermediate_hidden: multiples of 128.
        use_fp8_dispatch: None, or whether ``mma_type`` begins with fp8.
        mma_type: of tokens and weights: "fp8xfp4" for :func:`fp8_fp4_mega_moe`, "fp8xfp8" for :func:`fp8_mega_moe`,
            "bf16xbf16" for :func:`bf16_mega_moe`.
        activation: "swiglu".
        device: "cuda" is the current device; on "cpu" processes share memory.

    Raises:
        RuntimeError: a size or a name is none of these.

    The memory comes from ``torch.distributed._symmetric_memory`` where there are several ranks on GPUs. It holds
    every token of every rank in case they all choose this rank's experts.
    """
    op = "get_symm_buffer_for_mega_moe"
    if activation != "swiglu":
        fail(op, "activation", "value", activation, "swiglu")
    _checked_mma_type(op, mma_type)
    if use_fp8_dispatch is not None and use_fp8_dispatch != mma_type.startswith("fp8"):
        fail(op, "use_fp8_dispatch", "value", use_fp8_dispatch, not use_fp8_dispatch, f"mma_type is {mma_type}")
    ranks = 1 if group is None else group.size()
    shape = LayerShape(ranks, num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden, mma_type)
    _check_sizes(op, shape)
    size = shape.buffer_layout().bytes
    if ranks == 1:
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        handle: Any = types.SimpleNamespace(buffer_ptrs=[buffer.data_ptr()])
    elif torch.device(device).type == "cpu":
        buffer, handle = _shared_memory(group, size)
    else:
        import torch.distributed as dist
        import torch.distributed._symmetric_memory as symm_mem

        buffer = symm_mem.empty(size, dtype=torch.uint8, device=device)
        handle = symm_mem.rendezvous(buffer, group=group)
        buffer.zero_()
        torch.cuda.synchronize(buffer.device)
        dist.barrier(group=group)  # nobody signals to a buffer that is still to be zeroed
    return SymmBuffer(buffer, handle, 0 if group is None else group.rank(), group, shape)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _interleave(weights: Tensor) -> Tensor:
    experts, rows, hidden = weights.shape
    if rows % (2 * INTERLEAVE) != 0:
        fail("transform_weights_for_mega_moe", "l1_weights", "rows", rows, f"a multiple of {2 * INTERLEAVE}")
    halves = weights.view(experts, 2, rows // 2 // INTERLEAVE, INTERLEAVE, hidden)
    return halves.transpose(1, 2).reshape(experts, rows, hidden)


def _separate(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and ups of one expert's interleaved ``[2 * intermediate, hidden]``."""
    pairs = weights.unflatten(0, (-1, 2, INTERLEAVE))
    return pairs[:, 0].flatten(0, 1), pairs[:, 1].flatten(0, 1)


def transform_weights_for_mega_moe(
    l1_weights: Tensor | ScaledWeights, l2_weights: Tensor | ScaledWeights, activation: str = "swiglu"
) -> tuple[Tensor | ScaledWeights, Tensor | ScaledWeights]:
    """Weights in the order that Mega MoE reads them in; once, when they are loaded.

    Args:
        l1_weights: ``[local experts, 2 * intermediate, hidden]``, all gates before all ups: bfloat16, or
            float8_e4m3fn in a pair with float32 scales ``[local experts, 2 * intermediate / 128, hidden / 128]``, or
            FP4, two of K a byte, as uint8, int8 or float4_e2m1fn_x2 ``[.., hidden / 2]`` in a pair with scales of each
            row and 32 of K: float32 or float8_e8m0fnu ``[.., hidden / 32]``, or int32 ``[.., hidden / 128]``, four
            UE8M0 in a word.
        l2_weights: ``[local experts, hidden, intermediate]``, likewise.
        activation: "swiglu".

    Returns:
        The same with new l1 weights, in which eight gates and the eight ups that belong to them alternate. Scales of
        FP8, one for a block of 128 gates or ups, and l2 are as they were. Scales of FP4 alternate with their rows, and
        are int32 words, MN-major, those of l2 too; a float32 that is no power of two becomes UE8M0's NaN.
    """
    if activation != "swiglu":
        fail("transform_weights_for_mega_moe", "activation", "value", activation, "swiglu")
    if isinstance(l1_weights, Tensor):
        return _interleave(l1_weights.contiguous()), l2_weights
    values, scales = l1_weights
    # Rearranged as bytes: not every PyTorch can transpose FP8 everywhere.
    interleaved = _interleave(values.contiguous().view(torch.uint8)).view(values.dtype)
    if values.dtype not in _checks.FP4_DTYPES:
        return (interleaved, scales), l2_weights
    l2, l2_sf = l2_weights
    return (interleaved, _mn_major_words(_interleave(_scale_words(scales)))), (l2, _mn_major_words(_scale_words(l2_sf)))


def _scale_words(sf: Tensor) -> Tensor:
    """Scales along K as UE8M0, four in an int32."""
    if sf.dtype == torch.float32:
        return reference.pack_ue8m0(reference.ue8m0_bytes(sf))
    if sf.dtype == torch.float8_e8m0fnu:
        return reference.pack_ue8m0(sf.view(torch.uint8).to(torch.int32))
    if sf.dtype != torch.int32:
        dtypes = _checks.one_of(("float32", "float8_e8m0fnu", "int32"))
        fail("transform_weights_for_mega_moe", "scales", "dtype", str(sf.dtype).removeprefix("torch."), dtypes)
    return sf.contiguous()


def _mn_major_words(words: Tensor) -> Tensor:
    return words.transpose(1, 2).contiguous().transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def _call(
    op: str,
    y: Tensor | None,
    weights: dict[str, Tensor],
    sym_buffer: SymmBuffer,
    stats: Tensor | None,
    activation: str,
    activation_clamp: float | None,
    num_tokens: int | None,
    expected_m: int | None,
    timeout_ms: int,
) -> Tensor:
    if activation != "swiglu":
        fail(op, "activation", "value", activation, "swiglu")
    if sym_buffer.buffer is None:
        fail(op, "sym_buffer", "state", "destroyed", "a buffer")
    if sym_buffer.mma_type != _MMA_TYPE_OF[op]:
        fail(op, "sym_buffer", "mma_type", sym_buffer.mma_type, _MMA_TYPE_OF[op])
    if torch.is_grad_enabled():
        _refuse_grad(op, **weights)
    if y is None and num_tokens is None:
        fail(op, "num_tokens", "value", None, "the number of tokens, or y")
    arguments = (
        *weights.values(),
        sym_buffer.buffer,
        list(sym_buffer.handle.buffer_ptrs),
        sym_buffer.rank,
        num_tokens if y is None else y.shape[0],
        sym_buffer.num_max_tokens_per_rank,
        sym_buffer.num_experts,
        sym_buffer.num_topk,
    )
    keywords: dict[str, Any] = {}
    if stats is not None:
        keywords["cumulative_local_expert_recv_stats"] = stats
    if activation_clamp is not None:
        keywords["activation_clamp"] = activation_clamp
    if expected_m is not None:
        keywords["expected_m"] = expected_m
    if timeout_ms != DEFAULT_TIMEOUT_MS:
        keywords["timeout_ms"] = timeout_ms
    overloads = getattr(torch.ops.deep_gemm, op)
    if y is None:
        return overloads.default(*arguments, **keywords)
    overloads.out(*arguments, out=y, **keywords)
    return y


def fp8_mega_moe(
    y: Tensor | None,
    l1_weights: ScaledWeights,
    l2_weights: ScaledWeights,
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: Tensor | None = None,
    recipe: tuple[int, int, int] = (1, 128, 128),
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
    *,
    num_tokens: int | None = None,
    expected_m: int | None = None,
    timeout_ms: int = DEFAULT_TIMEOUT_MS,
) -> Tensor:
    """The expert layer of all ranks, one of which this is: dispatch, both linears, SwiGLU and combination.

    ``y[t] = sum_c down(e, quantise(silu(gate(e, x[t])) * up(e, x[t]) * topk_weights[t, c]))``, ``e = topk_idx[t, c]``.
    Gates and ups are rounded to BF16, their product is quantised to FP8 with a scale per token and 128 elements, and
    an expert's result for a token is rounded to BF16 before the sum over c, which is taken in this order in FP32:
    what ``m_grouped_fp8_gemm_nt_contiguous`` and ``swiglu_cast_to_fp8`` give one after the other.

    Args:
        y: bfloat16 ``[tokens, hidden]`` to write, rows 16-byte aligned; returned. None allocates it.
        l1_weights, l2_weights: float8_e4m3fn with float32 scales per block of 128 x 128, of this rank's experts, as
            :func:`transform_weights_for_mega_moe` returns them.
        sym_buffer: this rank's buffer, whose first ``tokens`` rows of inputs are written.
        cumulative_local_expert_recv_stats: int32 ``[local experts]``: the number of tokens that each of this rank's
            experts gets in this call is added.
        recipe: (1, 128, 128).
        activation: "swiglu".
        activation_clamp: gates at most that, ups between its negative and it; positive.
        fast_math: accepted; there is one arithmetic.
        num_tokens: of this rank, where y is None. It may be 0, and differ from rank to rank.
        expected_m: how many tokens an expert of this rank will get, about, for the choice of the kernel. None assumes
            that all ranks have as many tokens as this one, and that no choice is masked.
        timeout_ms: how long a rank waits for another one before it gives up, with a message that names it: on a GPU
            the kernel behind this one fails an assertion, on the CPU RuntimeError is raised.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides, value or device, or requires grad. On
            the CPU also: ``topk_idx`` has an expert that does not exist, or one twice for a token. Elsewhere the
            former is ignored like -1, and the latter gives wrong values.

    All ranks have to call it, in the same order. The same inputs give the same bits. On SM90 and CPU; SM100's tensor
    core takes UE8M0 scales per 32 alone, for which there is :func:`fp8_fp4_mega_moe`. Specification:
    ``deep_gemm_ops.mega_moe.reference_experts``.
    """
    op = "fp8_mega_moe"
    if tuple(recipe) != (1, 128, 128):
        fail(op, "recipe", "value", list(recipe), [1, 128, 128])
    weights = {"l1": l1_weights[0], "l1_sf": l1_weights[1], "l2": l2_weights[0], "l2_sf": l2_weights[1]}
    return _call(
        op,
        y,
        weights,
        sym_buffer,
        cumulative_local_expert_recv_stats,
        activation,
        activation_clamp,
        num_tokens,
        expected_m,
        timeout_ms,
    )


def fp8_fp4_mega_moe(
    y: Tensor | None,
    l1_weights: ScaledWeights,
    l2_weights: ScaledWeights,
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: Tensor | None = None,
    recipe: tuple[int, int, int] = (1, 1, 32),
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
    *,
    num_tokens: int | None = None,
    expected_m: int | None = None,
    timeout_ms: int = DEFAULT_TIMEOUT_MS,
) -> Tensor:
    """As :func:`fp8_mega_moe`, with FP4 weights and UE8M0 scales per 32 of K, of weights and of tokens.

    The product of SwiGLU and the routing weight is quantised to FP8 with a UE8M0 scale per token and 32 elements: what
    ``m_grouped_fp8_fp4_gemm_nt_contiguous`` with recipe ``[1, 1, 32]`` and ``swiglu_cast_to_fp8`` with ``gran_k=32``
    and ``use_packed_ue8m0=True`` give one after the other. ``recipe`` is (1, 1, 32).

    Weights are pairs as :func:`transform_weights_for_mega_moe` returns them: two FP4 values of K a byte, the even one
    in the low nibble, as uint8, int8 or float4_e2m1fn_x2 ``[local experts, 2 * intermediate, hidden / 2]`` and
    ``[local experts, hidden, intermediate / 2]``, and int32 words of four scales ``[.., hidden / 128]`` and
    ``[.., intermediate / 128]``, stride 1 along the rows. ``sym_buffer`` has ``mma_type`` "fp8xfp4", its ``x_sf`` is
    int32: ``per_token_cast_to_fp8(x, gran_k=32, use_packed_ue8m0=True)`` gives both. Its pool has two bytes for each
    element of tokens and hidden activations: SM90's tensor core reads them and the weights as BF16, scales included. On
    SM100 base addresses of weights are multiples of 32 bytes.
    """
    op = "fp8_fp4_mega_moe"
    if tuple(recipe) != (1, 1, 32):
        fail(op, "recipe", "value", list(recipe), [1, 1, 32])
    weights = {"l1": l1_weights[0], "l1_sf": l1_weights[1], "l2": l2_weights[0], "l2_sf": l2_weights[1]}
    return _call(
        op,
        y,
        weights,
        sym_buffer,
        cumulative_local_expert_recv_stats,
        activation,
        activation_clamp,
        num_tokens,
        expected_m,
        timeout_ms,
    )


def bf16_mega_moe(
    y: Tensor | None,
    l1_weights: Tensor,
    l2_weights: Tensor,
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: Tensor | None = None,
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
    *,
    num_tokens: int | None = None,
    expected_m: int | None = None,
    timeout_ms: int = DEFAULT_TIMEOUT_MS,
) -> Tensor:
    """As :func:`fp8_mega_moe`, with bfloat16 tokens and weights and without scales.

    The product of SwiGLU and the routing weight is rounded to BF16 instead of FP8. ``sym_buffer`` has ``mma_type``
    "bf16xbf16".
    """
    return _call(
        "bf16_mega_moe",
        y,
        {"l1": l1_weights, "l2": l2_weights},
        sym_buffer,
        cumulative_local_expert_recv_stats,
        activation,
        activation_clamp,
        num_tokens,
        expected_m,
        timeout_ms,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checks


class _Arguments(NamedTuple):
    """An operator's arguments; the scales are None with BF16."""

    op: str
    l1: Tensor
    l1_sf: Tensor | None
    l2: Tensor
    l2_sf: Tensor | None
    buffer: Tensor
    buffer_ptrs: Sequence[int]
    rank: int
    num_tokens: int
    num_max_tokens_per_rank: int
    num_experts: int
    num_topk: int
    stats: Tensor | None
    clamp: float | None
    expected_m: int | None
    timeout_ms: int
    out: Tensor | None

    @property
    def shape(self) -> LayerShape:
        mma_type = _MMA_TYPE_OF[self.op]
        values = 2 if mma_type == "fp8xfp4" else 1  # of K in an element
        hidden, intermediate = values * _checks.shape_of(self.l1)[2], values * _checks.shape_of(self.l2)[2]
        return LayerShape(
            len(self.buffer_ptrs),
            self.num_experts,
            self.num_max_tokens_per_rank,
            self.num_topk,
            hidden,
            intermediate,
            mma_type,
        )


def _check_dense(op: str, arg: str, x: Tensor) -> None:
    shape, expected = _checks.shape_of(x), 1
    for i in reversed(range(x.dim())):
        stride = _checks.strides_of(x)[i]
        if shape[i] > 1 and not stride == expected:
            fail(op, arg, f"dimension-{i} stride", stride, expected)
        expected *= shape[i]


def _check(a: _Arguments, real: bool) -> None:
    """``real`` is False where tensors have no memory (fakes)."""
    op = a.op
    is_fp4 = _MMA_TYPE_OF[op] == "fp8xfp4"
    dtypes = _checks.FP4_DTYPES if is_fp4 else (torch.bfloat16 if a.l1_sf is None else torch.float8_e4m3fn,)
    scales = (torch.int32 if is_fp4 else torch.float32,)
    matrices = {"l1": (a.l1, dtypes, 3), "l1_sf": (a.l1_sf, scales, 3), "l2": (a.l2, dtypes, 3)}
    matrices |= {"l2_sf": (a.l2_sf, scales, 3), "buffer": (a.buffer, (torch.uint8,), 1)}
    matrices |= {
        "cumulative_local_expert_recv_stats": (a.stats, (torch.int32,), 1),
        "out": (a.out, (torch.bfloat16,), 2),
    }
    given = {arg: entry for arg, entry in matrices.items() if entry[0] is not None}
    for arg, (x, accepted, rank) in given.items():
        _checks.check_dtype(op, arg, x, accepted)
        _checks.check_rank(op, arg, x, (rank,))
    for arg, (x, _, _) in given.items():
        _checks.check_device(op, arg, x, a.l1.device, "l1")
    shape = a.shape
    _check_sizes(op, shape)
    if not 0 <= a.rank < shape.num_ranks:
        fail(op, "rank", "value", a.rank, f"0 to {shape.num_ranks - 1}")
    tokens = _checks.concrete(a.num_tokens)
    if not (tokens >= 0 and tokens <= shape.max_tokens):
        fail(op, "num_tokens", "value", tokens, f"0 to {shape.max_tokens}")
    if a.clamp is not None and not a.clamp > 0:
        fail(op, "activation_clamp", "value", float(a.clamp), "a positive number")
    expected_m = None if a.expected_m is None else _checks.concrete(a.expected_m)
    if expected_m is not None and not expected_m >= 0:
        fail(op, "expected_m", "value", expected_m, "at least 0")
    if not a.timeout_ms > 0:
        fail(op, "timeout_ms", "value", a.timeout_ms, "a positive integer")
    experts, hidden, intermediate = shape.local_experts, shape.hidden, shape.intermediate
    packed, values = (" / 2", 2) if is_fp4 else ("", 1)  # a byte of FP4 has two
    names = f"[local experts, 2 * intermediate, hidden{packed}]"
    _checks.check_shape(op, "l1", a.l1, names, [experts, 2 * intermediate, hidden // values])
    names = f"[local experts, hidden, intermediate{packed}]"
    _checks.check_shape(op, "l2", a.l2, names, [experts, hidden, intermediate // values])
    for arg, x in (("l1", a.l1), ("l2", a.l2)):
        _check_dense(op, arg, x)
        if real and x.data_ptr() % 16 != 0:
            fail(op, arg, "base address", f"{x.data_ptr() % 16} modulo 16 bytes", 0)
    if a.l1_sf is not None and a.l2_sf is not None:
        rows, gran = ("", 1) if is_fp4 else (" / 128", 128)  # that share a scale
        l1_sf_shape = [experts, 2 * intermediate // gran, hidden // _GRAN_K]
        l2_sf_shape = [experts, hidden // gran, intermediate // _GRAN_K]
        names = f"[local experts, 2 * intermediate{rows}, hidden / 128]"
        _checks.check_shape(op, "l1_sf", a.l1_sf, names, l1_sf_shape)
        names = f"[local experts, hidden{rows}, intermediate / 128]"
        _checks.check_shape(op, "l2_sf", a.l2_sf, names, l2_sf_shape)
        for arg, x, sf_shape in (("l1_sf", a.l1_sf, l1_sf_shape), ("l2_sf", a.l2_sf, l2_sf_shape)):
            if not is_fp4:
                continue  # any strides
            _checks.check_exact_strides(op, arg, x, _checks.mn_major_strides(sf_shape))
            if real and x.data_ptr() % 16 != 0:
                fail(op, arg, "base address", f"{x.data_ptr() % 16} modulo 16 bytes", 0)
    needed = shape.buffer_layout().bytes
    _check_dense(op, "buffer", a.buffer)
    if not _checks.shape_of(a.buffer)[0] >= needed:
        fail(op, "buffer", "bytes", _checks.shape_of(a.buffer)[0], f"at least {needed}")
    # Alone, a rank may work on a copy, as functionalisation makes one.
    if real and shape.num_ranks > 1 and a.buffer.data_ptr() != a.buffer_ptrs[a.rank]:
        fail(op, "buffer", "address", a.buffer.data_ptr(), a.buffer_ptrs[a.rank], "that of this rank in buffer_ptrs")
    for ptr in a.buffer_ptrs if real else ():
        if ptr == 0 or ptr % 16 != 0:
            fail(op, "buffer_ptrs", "address", ptr, "a multiple of 16")
    if a.stats is not None:
        arg = "cumulative_local_expert_recv_stats"
        _checks.check_shape(op, arg, a.stats, "[local experts]", [experts])
        _check_dense(op, arg, a.stats)
    if a.out is not None:
        _checks.check_shape(op, "out", a.out, "[num_tokens, hidden]", [tokens, hidden])
        _checks.check_tma_readable(op, "out", a.out, real)


# ---------------------------------------------------------------------------------------------------------------------
# Specification


def reference_experts(
    x: Tensor,
    x_sf: Tensor | None,
    topk_idx: Tensor,
    topk_weights: Tensor,
    l1: Tensor,
    l1_sf: Tensor | None,
    l2: Tensor,
    l2_sf: Tensor | None,
    *,
    first_expert: int = 0,
    clamp: float | None = None,
    exact: bool = False,
) -> Tensor:
    """What the experts from ``first_expert`` on, whose weights these are, give for each choice of each token.

    Returns ``[tokens, topk, hidden]``, zeros where another expert is chosen: bfloat16, or with ``exact`` float64, where
    nothing is rounded or quantised between the linears. The layer is the sum over topk of all experts' results.
    """
    is_fp4 = l1.dtype in _checks.FP4_DTYPES
    gran_mn, gran_k = (1, 32) if is_fp4 else (128, _GRAN_K)  # of weights; tokens have a scale per row and gran_k
    dtype = torch.float64 if exact else torch.float32

    def product(a: Tensor, a_sf: Tensor | None, b: Tensor, b_sf: Tensor | None) -> Tensor:
        if a_sf is not None:
            a = reference.dequantize(a, a_sf, 1, gran_k, dtype)
        if b_sf is not None:
            b = reference.dequantize(expand_fp4(b), b_sf, gran_mn, gran_k, dtype)
        return a.to(dtype) @ b.to(dtype).t()

    results = torch.zeros(*topk_idx.shape, l2.shape[1], dtype=dtype if exact else torch.bfloat16, device=x.device)
    for expert in range(l1.shape[0]):
        token, choice = (topk_idx == first_expert + expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        weights = torch.cat(_separate(l1[expert].view(torch.uint8 if l1_sf is not None else l1.dtype))).view(l1.dtype)
        # Scales of FP8 weights are those of 128 gates, then of 128 ups, one for each; those of FP4 follow the rows.
        weights_sf = None if l1_sf is None else torch.cat(_separate(l1_sf[expert])) if is_fp4 else l1_sf[expert]
        tokens_sf = None if x_sf is None else x_sf[token]
        both = product(x.view(torch.uint8)[token].view(x.dtype), tokens_sf, weights, weights_sf)
        gate, up = (both if exact else both.to(torch.bfloat16).float()).chunk(2, dim=1)
        if clamp is not None:
            limit = torch.tensor(clamp, dtype=torch.float32, device=x.device).to(gate.dtype)
            gate, up = torch.minimum(gate, limit), torch.maximum(torch.minimum(up, limit), -limit)
        active = gate / (1 + torch.exp(-gate)) if exact else silu(gate.contiguous())
        h = active * up * topk_weights[token, choice, None].to(gate.dtype)
        if exact or l2_sf is None:
            h_sf = None
            h = h if exact else h.to(torch.bfloat16)
        else:
            h, h_sf = reference.per_token_cast_to_fp8(h, gran_k=gran_k, use_packed_ue8m0=is_fp4)
        results[token, choice] = product(h, h_sf, l2[expert], None if l2_sf is None else l2_sf[expert]).to(
            results.dtype
        )
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Fakes and CPU


def _collect(op: str, args: Sequence[Any], keywords: dict[str, Any], out: Tensor | None = None) -> _Arguments:
    l1, l1_sf, l2, l2_sf, *rest = args if op != "bf16_mega_moe" else (args[0], None, args[1], None, *args[2:])
    return _Arguments(
        op,
        l1,
        l1_sf,
        l2,
        l2_sf,
        *rest,
        stats=keywords.get("cumulative_local_expert_recv_stats"),
        clamp=keywords.get("activation_clamp"),
        expected_m=keywords.get("expected_m"),
        timeout_ms=keywords.get("timeout_ms", DEFAULT_TIMEOUT_MS),
        out=out,
    )


def _wait(word: Tensor, call: int, a: _Arguments, step: str, rank: int) -> None:
    """Until another thread or process has written this call's number."""
    deadline = time.monotonic() + a.timeout_ms / 1000
    while int(word) != call:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{a.op}: rank {a.rank} timed out waiting for rank {rank} (step {step})")
        time.sleep(0.0001)


def _run(a: _Arguments) -> Tensor:
    """On the CPU: the protocol of the kernels between threads or processes, each a rank."""
    _check(a, real=True)
    shape, header_words = a.shape, _HEADER_BYTES // 4
    layout = shape.buffer_layout()
    ptrs = list(a.buffer_ptrs)
    ptrs[a.rank] = a.buffer.data_ptr()
    memories = [torch.frombuffer((ctypes.c_uint8 * layout.bytes).from_address(p), dtype=torch.uint8) for p in ptrs]
    headers = [_view(memory, 0, torch.int32, header_words) for memory in memories]
    views = [_views(memory, shape) for memory in memories]
    mine, experts = views[a.rank], shape.local_experts
    # Of the header in 32-bit words: the call at 0, each rank's tokens and call from 256 on, its results' call behind.
    arrived, combined = 1024 // 4, 1024 // 4 + 2 * MAX_RANKS
    call = int(headers[a.rank][0]) + 1

    _check_choices(a.op, mine.topk_idx[: a.num_tokens], shape.num_experts)
    for header in headers:
        header[arrived + 2 * a.rank] = a.num_tokens
        header[arrived + 2 * a.rank + 1] = call
    for rank in range(shape.num_ranks):
        _wait(headers[a.rank][arrived + 2 * rank + 1], call, a, "enter", rank)
    received = torch.zeros(experts, dtype=torch.int64)
    first_expert = a.rank * experts
    for rank, peer in enumerate(views):
        tokens = int(headers[a.rank][arrived + 2 * rank])
        topk_idx = peer.topk_idx[:tokens]
        is_mine = (topk_idx >= first_expert) & (topk_idx < first_expert + experts)
        received += torch.bincount(topk_idx[is_mine] - first_expert, minlength=experts)
        results = reference_experts(
            peer.x[:tokens],
            None if peer.x_sf is None else peer.x_sf[:tokens],
            topk_idx,
            peer.topk_weights[:tokens],
            a.l1,
            a.l1_sf,
            a.l2,
            a.l2_sf,
            first_expert=first_expert,
            clamp=a.clamp,
        )
        peer.combine[:tokens][is_mine] = results[is_mine]
    if a.stats is not None:
        a.stats.add_(received.to(torch.int32))
    for header in headers:
        header[combined + a.rank] = call
    for rank in range(shape.num_ranks):
        _wait(headers[a.rank][combined + rank], call, a, "leave", rank)
    y = torch.zeros(a.num_tokens, shape.hidden)
    for choice in range(shape.topk):
        chosen = mine.topk_idx[: a.num_tokens, choice] >= 0
        y[chosen] += mine.combine[: a.num_tokens, choice][chosen].float()
    headers[a.rank][0] = call
    return y.to(torch.bfloat16)


def _check_choices(op: str, topk_idx: Tensor, num_experts: int) -> None:
    if topk_idx.numel() == 0:
        return
    low, high = int(topk_idx.min()), int(topk_idx.max())
    if low < -1 or high >= num_experts:
        fail(op, "topk_idx", "value", low if low < -1 else high, f"-1 to {num_experts - 1}")
    sorted_idx = topk_idx.sort(dim=1).values
    twice = ((sorted_idx[:, 1:] == sorted_idx[:, :-1]) & (sorted_idx[:, 1:] >= 0)).any(dim=1)
    if bool(twice.any()):
        fail(op, "topk_idx", "value", topk_idx[int(twice.nonzero()[0])].tolist(), "an expert once for each token")


def _register(op: str) -> None:
    @_fake(op)
    def fake_functional(*args: Any, **keywords: Any) -> Tensor:
        a = _collect(op, args, keywords)
        _check(a, real=False)
        return a.l1.new_empty((a.num_tokens, a.shape.hidden), dtype=torch.bfloat16)

    @_fake(f"{op}.out")
    def fake_out(*args: Any, out: Tensor, **keywords: Any) -> None:
        _check(_collect(op, args, keywords, out), real=False)

    @_cpu(op)
    def functional(*args: Any, **keywords: Any) -> Tensor:
        return _run(_collect(op, args, keywords))

    @_cpu(f"{op}.out")
    def write(*args: Any, out: Tensor, **keywords: Any) -> None:
        out.copy_(_run(_collect(op, args, keywords, out)))


for _op in _MMA_TYPE_OF:
    _register(_op)

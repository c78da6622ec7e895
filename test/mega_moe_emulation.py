"""Runs Mega MoE under the PTX emulator, all ranks' kernels side by side, through the library's own host code.

`MegaCase` is a layer in one line of text that repeats a failure:

    python test/mega_moe_emulation.py "MegaCase((3, 5), num_experts=4, topk=2, seed=3)"
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import sys

import torch

from deep_gemm_ops import _capi, mega_moe, reference
from deep_gemm_ops.fused_casts import silu

import ptx_emulator
from common import FP8, assert_close, assert_equal, generator, same_bits
from gemm_emulation import _LAUNCH, BUDGET, _region, units


class _BlockScales(ctypes.Structure):
    """MegaMoeBlockScales of src/device/mega_moe_params.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride_expert", ctypes.c_int64),
        ("stride_row", ctypes.c_int64),
        ("stride_k", ctypes.c_int64),
    ]


class Problem(ctypes.Structure):
    """MegaMoeProblem of src/host/mega_moe.h."""

    _fields_ = [
        ("num_ranks", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("num_experts", ctypes.c_int64),
        ("max_tokens", ctypes.c_int64),
        ("topk", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("is_bf16", ctypes.c_int),
        ("l1", ctypes.c_void_p),
        ("l2", ctypes.c_void_p),
        ("l1_sf", _BlockScales),
        ("l2_sf", _BlockScales),
        ("buffers", ctypes.POINTER(ctypes.c_int64)),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_int64),
        ("stats", ctypes.c_void_p),
        ("clamped", ctypes.c_int),
        ("clamp", ctypes.c_float),
        ("timeout_ns", ctypes.c_int64),
    ]


def sizes_of(shape: mega_moe.LayerShape) -> dict[str, int]:
    """The members of `Problem` that a shape gives."""
    fields = ("num_ranks", "num_experts", "max_tokens", "topk", "hidden", "intermediate")
    return {**{field: getattr(shape, field) for field in fields}, "is_bf16": int(shape.is_bf16)}


def library_layout(shape: mega_moe.LayerShape) -> mega_moe.BufferLayout:
    """The layout of a buffer as the library has it."""
    offsets = (ctypes.c_int64 * len(mega_moe.BufferLayout._fields))()
    _capi.library().dg_mega_moe_offsets(ctypes.byref(Problem(**sizes_of(shape))), offsets)
    return mega_moe.BufferLayout(*offsets)


@dataclasses.dataclass
class Weights:
    """A rank's, as the operators take them; the scales are None with BF16."""

    l1: torch.Tensor
    l1_sf: torch.Tensor | None
    l2: torch.Tensor
    l2_sf: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self.l1, self.l1_sf, self.l2, self.l2_sf) if x is not None]


@dataclasses.dataclass
class Inputs:
    """A rank's, of one call."""

    x: torch.Tensor
    x_sf: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def launches_of(
    buffer: mega_moe.SymmBuffer,
    weights: Weights,
    y: torch.Tensor,
    stats: torch.Tensor | None,
    *,
    num_sms: int,
    block_tokens: int,
    clamp: float | None,
    timeout_ns: int,
    regions: list,
    module: ptx_emulator.Module | None = None,
) -> list[ptx_emulator.Launch]:
    """A rank's kernels: the layer, and the one that reports time-outs."""
    problem = Problem(**sizes_of(buffer.shape))
    problem.rank, problem.num_tokens = buffer.rank, y.shape[0]
    problem.l1, problem.l2 = weights.l1.data_ptr(), weights.l2.data_ptr()
    if weights.l1_sf is not None and weights.l2_sf is not None:
        problem.l1_sf = _BlockScales(weights.l1_sf.data_ptr(), *weights.l1_sf.stride())
        problem.l2_sf = _BlockScales(weights.l2_sf.data_ptr(), *weights.l2_sf.stride())
    problem.buffers = (ctypes.c_int64 * buffer.shape.num_ranks)(*buffer.handle.buffer_ptrs)
    problem.y, problem.y_stride = y.data_ptr(), max(y.stride(0), buffer.hidden)
    problem.stats = None if stats is None else stats.data_ptr()
    problem.clamped, problem.clamp = int(clamp is not None), clamp or 0.0
    problem.timeout_ns = timeout_ns
    result: list[ptx_emulator.Launch] = []
    failure: list[BaseException] = []

    def launch(kernel, grid, block, cluster, shared_bytes, params, params_bytes):
        try:
            name = kernel.decode()
            ((compiled, entry),) = [(m, e) for _, m in units("mega_moe") for e in m.entries if name in e]
            changed = module if module is not None and entry in module.entries else compiled
            arguments = [ctypes.string_at(params, params_bytes)]
            result.append(
                ptx_emulator.Launch(changed, entry, grid, block, arguments, smem=shared_bytes, buffers=regions)
            )
            return 0
        except BaseException as error:  # an exception cannot cross the C frames in between
            failure.append(error)
            return 1

    error = ctypes.create_string_buffer(4096)
    status = _capi.library().dg_run_mega_moe(
        ctypes.byref(problem),
        num_sms,
        block_tokens,
        ctypes.c_void_p(ptx_emulator.encode_tiled_function()),
        _LAUNCH(launch),
        error,
        ctypes.c_size_t(len(error)),
    )
    if failure:
        raise failure[0]
    if status != 0:
        raise RuntimeError(error.value.decode())
    return result


def kernel_reference(case: MegaCase, inputs: list[Inputs], weights: list[Weights]) -> list[torch.Tensor]:
    """Each rank's y in the kernel's own arithmetic: sums of 128 elements are exact, then scaled and added in float32."""

    def scaled_sum(a, a_sf, b, b_sf):
        total = torch.zeros(a.shape[0], b.shape[0])
        for k in range(a.shape[1] // 128):
            part = slice(128 * k, 128 * k + 128)
            product = (a[:, part].double() @ b[:, part].double().t()).float()
            scale = a_sf[:, k : k + 1] * b_sf[:, k].repeat_interleave(128)[None, : b.shape[0]]
            total = (product.double() * scale.double() + total.double()).float()
        return total

    experts = case.num_experts // case.num_ranks
    results = []
    for rank_inputs in inputs:
        y = torch.zeros(rank_inputs.x.shape[0], case.hidden)
        for choice in range(case.topk):
            for token, expert in enumerate(rank_inputs.topk_idx[:, choice].tolist()):
                if not 0 <= expert < case.num_experts:
                    continue
                w, e = weights[expert // experts], expert % experts
                gates, ups = mega_moe._separate(w.l1[e].float())
                x, x_sf = rank_inputs.x[token : token + 1].float(), rank_inputs.x_sf[token : token + 1]
                blocks = case.intermediate // 128
                gate = scaled_sum(x, x_sf, gates, w.l1_sf[e][:blocks]).bfloat16().float()
                up = scaled_sum(x, x_sf, ups, w.l1_sf[e][blocks:]).bfloat16().float()
                if case.clamp is not None:
                    gate, up = gate.clamp(max=case.clamp), up.clamp(-case.clamp, case.clamp)
                h = silu(gate) * up * rank_inputs.topk_weights[token, choice]
                h, h_sf = reference.per_token_cast_to_fp8(h)
                y[token] += scaled_sum(h.float(), h_sf, w.l2[e].float(), w.l2_sf[e])[0].bfloat16().float()
        results.append(y.bfloat16())
    return results


@dataclasses.dataclass(frozen=True)
class MegaCase:
    """A layer of several ranks, called `calls` times.

    ``routing``: ``random`` distinct experts for each token, ``masked``: half of the choices are -1, ``wild``: some name
    experts that do not exist, ``same``: all tokens choose the last experts, ``none``: nobody chooses any.
    ``data``: ``normal``, or ``integer`` where every bit of the result is known.
    """

    tokens: tuple[int, ...]  # of each rank
    num_experts: int = 4
    topk: int = 2
    hidden: int = 256
    intermediate: int = 128
    max_tokens: int = 0  # 0: as many as there are, at least 1
    mma_type: str = "fp8xfp8"
    block_tokens: int = 16
    routing: str = "random"
    data: str = "normal"
    clamp: float | None = None
    num_sms: int = 2  # of each rank
    calls: int = 1
    seed: int = 0  # of the schedule; the data depends on the rest

    @property
    def num_ranks(self) -> int:
        return len(self.tokens)

    @property
    def repro(self) -> str:
        default = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: value for name, value in dataclasses.asdict(self).items() if value != default[name]}
        arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f'python test/mega_moe_emulation.py "MegaCase({arguments})"'

    @property
    def is_bf16(self) -> bool:
        return self.mma_type == "bf16xbf16"

    def buffers(self, device: str = "cpu") -> list[mega_moe.SymmBuffer]:
        most = self.max_tokens or max(1, *self.tokens)
        sizes = (self.num_ranks, self.num_experts, most, self.topk, self.hidden, self.intermediate)
        return mega_moe.SymmBuffer.in_one_process(*sizes, mma_type=self.mma_type, device=device)

    def weights(self) -> list[Weights]:
        random = generator(hash((self.num_experts, self.hidden, self.intermediate)) % 2**32)
        experts, result = self.num_experts // self.num_ranks, []
        for _ in range(self.num_ranks):
            shapes = ((experts, 2 * self.intermediate, self.hidden), (experts, self.hidden, self.intermediate))
            if self.data == "integer":
                # Few ones: gates and ups stay small.
                matrices = [torch.randint(-8, 9, shape, generator=random) for shape in shapes]
                matrices = [x.where(x.abs() == 1, 0).float() for x in matrices]
            else:
                matrices = [torch.randn(shape, generator=random) / shape[2] ** 0.5 for shape in shapes]
            if self.is_bf16:
                l1, l2 = (x.bfloat16() for x in matrices)
                l1, l2 = mega_moe.transform_weights_for_mega_moe(l1, l2)
                result.append(Weights(l1, None, l2, None))
                continue
            if self.data == "integer":
                scales = [torch.randint(-1, 2, (s[0], s[1] // 128, s[2] // 128), generator=random) for s in shapes]
                pairs = [(x.to(FP8), torch.exp2(sf.float())) for x, sf in zip(matrices, scales)]
            else:
                casts = [[reference.per_block_cast_to_fp8(expert) for expert in x] for x in matrices]
                pairs = [tuple(torch.stack(column) for column in zip(*cast)) for cast in casts]
            (l1, l1_sf), (l2, l2_sf) = mega_moe.transform_weights_for_mega_moe(*pairs)
            result.append(Weights(l1, l1_sf, l2, l2_sf))
        return result

    def inputs(self, call: int = 0) -> list[Inputs]:
        random = generator(hash((self.tokens, self.num_experts, self.topk, self.hidden, call)) % 2**32)
        result = []
        for tokens in self.tokens:
            scores = torch.rand(tokens, self.num_experts, generator=random)
            topk_idx = scores.topk(self.topk, dim=1).indices
            if self.routing == "same":
                topk_idx = torch.arange(self.num_experts - self.topk, self.num_experts).repeat(tokens, 1)
            elif self.routing == "none":
                topk_idx = torch.full_like(topk_idx, -1)
            elif self.routing in ("masked", "wild"):
                other = torch.tensor([-1] if self.routing == "masked" else [-(2**40), self.num_experts, 2**40])
                pick = other[torch.randint(len(other), topk_idx.shape, generator=random)]
                topk_idx = topk_idx.where(torch.rand(topk_idx.shape, generator=random) < 0.5, pick)
            topk_weights = torch.rand(tokens, self.topk, generator=random)
            if self.data == "integer":
                x = torch.randint(-2, 3, (tokens, self.hidden), generator=random).float()
                sf = torch.exp2(torch.randint(-1, 2, (tokens, self.hidden // 128), generator=random).float())
                x_values: tuple = (x.to(FP8), sf)
            else:
                x = torch.randn(tokens, self.hidden, generator=random)
                x_values = (x.bfloat16(), None) if self.is_bf16 else reference.per_token_cast_to_fp8(x)
            result.append(Inputs(*x_values, topk_idx, topk_weights))
        return result

    def expected(self, inputs: list[Inputs], weights: list[Weights], exact: bool) -> list[torch.Tensor]:
        experts, results = self.num_experts // self.num_ranks, []
        for i in inputs:
            y = torch.zeros(i.x.shape[0], self.hidden, dtype=torch.float64)
            for rank, w in enumerate(weights):
                arguments = (i.x, i.x_sf, i.topk_idx, i.topk_weights, w.l1, w.l1_sf, w.l2, w.l2_sf)
                y += mega_moe.reference_experts(
                    *arguments, first_expert=rank * experts, clamp=self.clamp, exact=exact
                ).double().sum(1)
            results.append(y)
        return results

    def write(self, buffers: list[mega_moe.SymmBuffer], inputs: list[Inputs]) -> None:
        """Inputs of a call; the rows behind them are poison."""
        for buffer, i in zip(buffers, inputs):
            count = i.x.shape[0]
            for view, value in ((buffer.x, i.x), (buffer.x_sf, i.x_sf), (buffer.topk_weights, i.topk_weights)):
                if view is not None and value is not None:
                    view.view(torch.uint8)[count:] = 0xFF
                    view[:count] = value
            buffer.topk_idx[count:] = 0
            buffer.topk_idx[:count] = i.topk_idx

    def check(self, y: list[torch.Tensor], inputs: list[Inputs], weights: list[Weights]) -> None:
        if self.data == "integer":
            for actual, want in zip(y, kernel_reference(self, inputs, weights)):
                assert_equal(actual, want, repro=self.repro)
            return
        # The same roundings, but other sums: some elements are rounded the other way. Then none of the roundings.
        for exact, tol in ((False, 4e-3 if self.is_bf16 else 8e-3), (True, 8e-3 if self.is_bf16 else 4e-2)):
            for actual, want in zip(y, self.expected(inputs, weights, exact)):
                assert_close(actual, want, tol=tol, repro=self.repro)

    def run(self, modules: dict[int, ptx_emulator.Module] | None = None, **options: int) -> list[torch.Tensor]:
        """Runs the case and returns the last call's results; raises AssertionError or PtxError with a line that repeats it.

        ``modules``: other versions of the kernel for some ranks.
        """
        buffers, weights = self.buffers(), self.weights()
        layout = library_layout(buffers[0].shape)
        # Nothing but the header and the counters needs to be zero: the rest is NaN before the first call.
        for buffer in buffers:
            buffer.buffer[layout.x : layout.counts] = 0xFF
            buffer.buffer[layout.sources :] = 0xFF
        experts = self.num_experts // self.num_ranks
        stats = [torch.full((experts,), 100 + rank, dtype=torch.int32) for rank in range(self.num_ranks)]
        received = [torch.full((experts,), 100 + rank) for rank in range(self.num_ranks)]
        options = {"budget": BUDGET, "seed": self.seed, "num_sms": self.num_sms * self.num_ranks, **options}
        for call in range(self.calls):
            inputs = self.inputs(call)
            self.write(buffers, inputs)
            y_buffers = [torch.full((tokens + 2, self.hidden + 8), math.nan, dtype=torch.bfloat16) for tokens in self.tokens]
            y = [buffer[1 : tokens + 1, : self.hidden] for buffer, tokens in zip(y_buffers, self.tokens)]
            launches = []
            # A rank reaches all buffers, but only its own weights, result and statistics.
            shared = [_region(buffer.buffer, f"buffer {rank}", False) for rank, buffer in enumerate(buffers)]
            for rank, buffer in enumerate(buffers):
                regions = [_region(x, f"weights {rank}", True) for x in weights[rank].tensors()]
                regions.append(_region(stats[rank], f"stats {rank}", False))
                if y[rank].numel():
                    regions.append(_region(y[rank], f"y {rank}", False))
                launches.append(
                    launches_of(
                        buffer,
                        weights[rank],
                        y[rank],
                        stats[rank],
                        num_sms=self.num_sms,
                        block_tokens=self.block_tokens,
                        clamp=self.clamp,
                        timeout_ns=10**15,
                        regions=shared + regions,
                        module=(modules or {}).get(rank),
                    )
                )
            try:
                for step in zip(*launches):
                    ptx_emulator.run(step, **options)
            except ptx_emulator.PtxError as error:
                raise ptx_emulator.PtxError(error.kind, f"{error}\nreproduce with: {self.repro}") from None
            self.check(y, inputs, weights)
            for buffer, inside in zip(y_buffers, y):
                rest = buffer.clone()
                rest.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(math.nan)
                assert same_bits(rest, torch.full_like(rest, math.nan)), f"wrote outside\nreproduce with: {self.repro}"
            for rank in range(self.num_ranks):
                chosen = torch.cat([i.topk_idx.flatten() for i in inputs]) - rank * experts
                received[rank] += torch.bincount(chosen[(chosen >= 0) & (chosen < experts)], minlength=experts)
                assert stats[rank].tolist() == received[rank].tolist(), f"statistics\nreproduce with: {self.repro}"
                memory = buffers[rank].buffer
                header = memory[:1024].view(torch.int32)
                assert header.tolist()[:2] == [call + 1, 0] and header[3:].eq(0).all(), "the header is not ready"
                assert not memory[layout.counts : layout.sources].any(), "the counters are not ready"
        return y


def main() -> None:
    case = eval(sys.argv[1], {"MegaCase": MegaCase})
    case.run()
    print(f"passed: {case}")


if __name__ == "__main__":
    main()

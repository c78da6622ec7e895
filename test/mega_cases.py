"""Layers of Mega MoE: their weights, their inputs call by call, and what comes out."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch

import deep_gemm_ops
from deep_gemm_ops import mega_moe, reference
from deep_gemm_ops.fp8_fp4_gemm import expand_fp4
from deep_gemm_ops.fused_casts import reference_per_token_cast_to_fp4, silu

from common import FP8, assert_close, assert_equal, generator


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


def kernel_reference(case: MegaCase, inputs: list[Inputs], weights: list[Weights]) -> list[torch.Tensor]:
    """Each rank's y in the kernel's arithmetic: exact sums of what shares scales, scaled and added in float32."""
    gran = 32 if case.is_fp4 else 128

    def scaled_sum(a, a_sf, b, b_sf):
        total = torch.zeros(a.shape[0], b.shape[0])
        for k in range(a.shape[1] // gran):
            part = slice(gran * k, gran * k + gran)
            product = (a[:, part].double() @ b[:, part].double().t()).float()
            scale = a_sf[:, k : k + 1] * b_sf[None, :, k]
            total = (product.double() * scale.double() + total.double()).float()
        return total

    def scales(sf):  # for each row, of gran elements
        return reference.scales_to_float32(sf, 4 * sf.shape[1] if case.is_fp4 else sf.shape[1])

    def by_row(sf):
        return scales(sf) if case.is_fp4 else sf.repeat_interleave(128, dim=0)

    experts = case.num_experts // case.num_ranks
    results = []
    for rank_inputs in inputs:
        y = torch.zeros(rank_inputs.x.shape[0], case.hidden)
        for choice in range(case.topk):
            for token, expert in enumerate(rank_inputs.topk_idx[:, choice].tolist()):
                if not 0 <= expert < case.num_experts:
                    continue
                w, e = weights[expert // experts], expert % experts
                gates, ups = mega_moe._separate(expand_fp4(w.l1[e]).float())
                # Scales of FP8 weights are not interleaved.
                sf = by_row(w.l1_sf[e])
                gates_sf, ups_sf = mega_moe._separate(sf) if case.is_fp4 else sf.chunk(2)
                x, x_sf = rank_inputs.x[token : token + 1].float(), scales(rank_inputs.x_sf[token : token + 1])
                gate = scaled_sum(x, x_sf, gates, gates_sf).bfloat16().float()
                up = scaled_sum(x, x_sf, ups, ups_sf).bfloat16().float()
                if case.clamp is not None:
                    gate, up = gate.clamp(max=case.clamp), up.clamp(-case.clamp, case.clamp)
                h = silu(gate) * up * rank_inputs.topk_weights[token, choice]
                h, h_sf = reference.per_token_cast_to_fp8(h, gran_k=gran, use_ue8m0=case.is_fp4)
                l2, l2_sf = expand_fp4(w.l2[e]).float(), by_row(w.l2_sf[e])
                y[token] += scaled_sum(h.float(), h_sf, l2, l2_sf)[0].bfloat16().float()
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
    tile_rows: int = -1  # of FP4's tiles of weights, 128 or 256; -1: the kernel chooses
    routing: str = "random"
    data: str = "normal"
    clamp: float | None = None
    num_sms: int = 2  # of each rank
    calls: int = 1
    seed: int = 0  # of the schedule; the data depends on the rest
    arch: int = 90  # whose kernels the emulator runs

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

    @property
    def is_fp4(self) -> bool:
        return self.mma_type == "fp8xfp4"

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
            if self.is_fp4:
                if self.data == "integer":
                    codes = [(2 * (x == 1) + 10 * (x == -1)).to(torch.uint8) for x in matrices]  # 1 and -1
                    values = [x[..., 0::2] | x[..., 1::2] << 4 for x in codes]
                    scales = [torch.randint(-1, 2, (*s[:2], s[2] // 32), generator=random) for s in shapes]
                    pairs = [(x, torch.exp2(sf.float())) for x, sf in zip(values, scales)]
                else:
                    casts = [reference_per_token_cast_to_fp4(x.flatten(0, 1), use_ue8m0=True) for x in matrices]
                    pairs = [(v.unflatten(0, s[:2]), sf.unflatten(0, s[:2])) for (v, sf), s in zip(casts, shapes)]
            elif self.data == "integer":
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
                gran = 32 if self.is_fp4 else 128
                sf = torch.exp2(torch.randint(-1, 2, (tokens, self.hidden // gran), generator=random).float())
                sf = reference.pack_ue8m0(reference.ue8m0_bytes(sf)) if self.is_fp4 else sf
                x_values: tuple = (x.to(FP8), sf)
            else:
                x = torch.randn(tokens, self.hidden, generator=random)
                options: dict = {"gran_k": 32, "use_packed_ue8m0": True} if self.is_fp4 else {}
                x_values = (x.bfloat16(), None) if self.is_bf16 else reference.per_token_cast_to_fp8(x, **options)
            result.append(Inputs(*x_values, topk_idx, topk_weights))
        return result

    def expected(self, inputs: list[Inputs], weights: list[Weights], exact: bool) -> list[torch.Tensor]:
        experts, results = self.num_experts // self.num_ranks, []
        for i in inputs:
            y = torch.zeros(i.x.shape[0], self.hidden, dtype=torch.float64, device=i.x.device)
            for rank, w in enumerate(weights):
                arguments = (i.x, i.x_sf, i.topk_idx, i.topk_weights, w.l1, w.l1_sf, w.l2, w.l2_sf)
                y += (
                    mega_moe.reference_experts(*arguments, first_expert=rank * experts, clamp=self.clamp, exact=exact)
                    .double()
                    .sum(1)
                )
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
        # The same roundings, but other sums and, on a GPU, another exponential: some are rounded the other way,
        # by a step of E4M3. Then none of the roundings, of which E4M3's is 3.7 % of a value.
        for exact, tol in ((False, 5e-3 if self.is_bf16 else 2.5e-2), (True, 8e-3 if self.is_bf16 else 5e-2)):
            for actual, want in zip(y, self.expected(inputs, weights, exact)):
                assert_close(actual, want, tol=tol, repro=self.repro)


def call(
    case: MegaCase, buffer: mega_moe.SymmBuffer, weights: Weights, num_tokens: int, **keywords: Any
) -> torch.Tensor:
    """The public function for one rank; y is a new tensor unless given."""
    keywords = {"num_tokens": num_tokens, "activation_clamp": case.clamp, **keywords}
    y = keywords.pop("y", None)
    if case.is_bf16:
        return deep_gemm_ops.bf16_mega_moe(y, weights.l1, weights.l2, buffer, **keywords)
    pairs = (weights.l1, weights.l1_sf), (weights.l2, weights.l2_sf)
    op = deep_gemm_ops.fp8_fp4_mega_moe if case.is_fp4 else deep_gemm_ops.fp8_mega_moe
    return op(y, *pairs, buffer, **keywords)  # type: ignore[arg-type]


def to_device(value: Any, device: str) -> Any:
    """The tensors of `Weights` or `Inputs` on a device."""
    moved = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return type(value)(**{name: None if x is None else x.to(device) for name, x in moved.items()})


def run_ranks(
    case: MegaCase,
    buffers: list[mega_moe.SymmBuffer],
    weights: list[Weights],
    stats: list[torch.Tensor] | None = None,
    expected_m: int | None = None,
) -> list[torch.Tensor]:
    """All ranks in this process: each has a thread on the CPU, a stream and a share of the SMs on a GPU.

    On a GPU the kernel has to be loaded already, which cannot be done while another rank's waits for it.
    """
    device = weights[0].l1.device
    results = [torch.empty(tokens, case.hidden, dtype=torch.bfloat16, device=device) for tokens in case.tokens]
    failures: list[Exception] = []
    keywords: dict[str, Any] = {"timeout_ms": 20_000, "expected_m": expected_m}

    def work(rank: int) -> None:
        try:
            more = {} if stats is None else {"cumulative_local_expert_recv_stats": stats[rank]}
            call(case, buffers[rank], weights[rank], case.tokens[rank], y=results[rank], **keywords, **more)
        except Exception as error:
            failures.append(error)

    if device.type == "cpu":
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(case.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        streams = [torch.cuda.Stream() for _ in range(case.num_ranks)]
        before = deep_gemm_ops.get_num_sms()
        deep_gemm_ops.set_num_sms(torch.cuda.get_device_properties(0).multi_processor_count // case.num_ranks)
        torch.cuda.synchronize()
        try:
            for rank, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    work(rank)
            torch.cuda.synchronize()
        finally:
            deep_gemm_ops.set_num_sms(before)
    if failures:
        raise failures[0]
    return results


def samples(device: str) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Calls of every overload, of a group of one rank."""
    result = []
    for mma_type, tokens in [("fp8xfp8", 3), ("fp8xfp8", 0), ("fp8xfp4", 3), ("bf16xbf16", 5)]:
        case = MegaCase((tokens,), num_experts=3, max_tokens=8, mma_type=mma_type)
        shape = mega_moe.LayerShape(1, 3, 8, case.topk, case.hidden, case.intermediate, mma_type)
        buffer = torch.zeros(shape.buffer_layout().bytes, dtype=torch.uint8, device=device)
        (inputs,), (weights,), views = case.inputs(), case.weights(), mega_moe._views(buffer, shape)
        views.topk_idx[:tokens] = inputs.topk_idx.to(device)
        views.topk_weights[:tokens] = inputs.topk_weights.to(device)
        (op,) = (op for op, of_type in mega_moe._MMA_TYPE_OF.items() if of_type == mma_type)
        packet = getattr(torch.ops.deep_gemm, op)
        stats = torch.zeros(3, dtype=torch.int32, device=device)
        # An address that is not the buffer's: alone, a rank reaches no other one's.
        arguments = (*to_device(weights, device).tensors(), buffer, [16], 0, tokens, 8, 3, case.topk)
        for keywords in ({}, {"cumulative_local_expert_recv_stats": stats, "activation_clamp": 2.0}):
            out = torch.zeros(tokens, case.hidden, dtype=torch.bfloat16, device=device)
            result.append((packet.default, arguments, keywords))
            result.append((packet.out, arguments, {**keywords, "out": out}))
    return result

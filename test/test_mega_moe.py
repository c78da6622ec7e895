"""Mega MoE on the CPU reference and, with the same code, on a GPU: values, ranks, tracing, bad input."""
# ruff: noqa: E501  (the messages are printed as they are)

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import pathlib
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline

import deep_gemm_ops
from deep_gemm_ops import _capi, mega_moe, reference

from common import assert_close, generator, same_bits
from mega_cases import MegaCase, call, run_ranks, samples, to_device
from test_bad_input import changed, messages, other_device


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest) -> None:
    """FP8 weights with FP32 scales are SM90's; SM100 has kernels for the other types."""
    name = request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"
    if name != "cuda":
        return
    major = torch.cuda.get_device_capability()[0]
    of_test = getattr(request.node, "callspec", None)
    mma_type = "fp8xfp8" if of_test is None else of_test.params.get("mma_type", "fp8xfp8")
    if major not in (9, 10) or (major == 10 and mma_type == "fp8xfp8"):
        pytest.skip(f"Mega MoE has no kernels for {mma_type} on SM{major}0")


def run(case: MegaCase, device: str, expected_m: int | None = None) -> None:
    """All calls of a case, each checked."""
    buffers = case.buffers(device)
    weights = case.weights()
    experts = case.num_experts // case.num_ranks
    stats = [torch.zeros(experts, dtype=torch.int32, device=device) for _ in range(case.num_ranks)]
    on_device = [to_device(w, device) for w in weights]
    received = [torch.zeros(experts, dtype=torch.int64) for _ in range(case.num_ranks)]
    for number in range(case.calls):
        inputs = case.inputs(number)
        case.write(buffers, [to_device(i, device) for i in inputs])
        y = run_ranks(case, buffers, on_device, stats, expected_m)
        case.check([x.cpu() for x in y], inputs, weights)
        for rank in range(case.num_ranks):
            chosen = torch.cat([i.topk_idx.flatten() for i in inputs]) - rank * experts
            received[rank] += torch.bincount(chosen[(chosen >= 0) & (chosen < experts)], minlength=experts)
            assert stats[rank].tolist() == received[rank].tolist()


@pytest.mark.parametrize("mma_type", mega_moe.MMA_TYPES)
@pytest.mark.parametrize("routing", ["random", "masked", "same", "none"])
@pytest.mark.parametrize("tokens", [(5,), (1,), (0,), (33,), (150,)])
def test_one_rank(device: str, tokens: tuple[int, ...], routing: str, mma_type: str) -> None:
    run(MegaCase(tokens, 4, 2, 384, 256, mma_type=mma_type, routing=routing, calls=2, clamp=0.5), device)


@pytest.mark.parametrize("expected_m", [1, 100])
@pytest.mark.parametrize("mma_type", mega_moe.MMA_TYPES)
@pytest.mark.parametrize("tokens", [(5, 9), (0, 3), (40, 1, 7, 0)])
def test_several_ranks_in_one_process(device: str, tokens: tuple[int, ...], mma_type: str, expected_m: int) -> None:
    if device == "cuda":  # loads the kernel
        run(MegaCase((max(tokens),), 8, 3, mma_type=mma_type), device, expected_m)
    run(MegaCase(tokens, 8, 3, mma_type=mma_type, calls=3), device, expected_m)


@pytest.mark.parametrize("mma_type", ["fp8xfp8", "fp8xfp4"])
def test_exact(device: str, mma_type: str) -> None:
    """Small integers leave no rounding but those that the operator promises."""
    for tokens in [(3,), (70,)]:
        case = MegaCase(tokens, 4, 2, 512, 256, mma_type=mma_type, data="integer", clamp=3.0)
        # The CPU multiplies what is dequantised: the same to the rounding of FP32.
        (buffer,), (weights,), (inputs,) = case.buffers(device), case.weights(), case.inputs()
        case.write([buffer], [to_device(inputs, device)])
        (expected,) = case.expected([inputs], [weights], exact=False)
        y = call(case, buffer, to_device(weights, device), tokens[0]).cpu()
        # A GPU's approximate exponential differs in its last bit: a few values are rounded the other way.
        assert_close(y, expected.bfloat16(), tol=2e-3 if device == "cuda" else 0.0)


@pytest.mark.parametrize("mma_type", ["fp8xfp8", "fp8xfp4"])
@pytest.mark.parametrize("tokens", [1, 13, 130])
def test_equals_the_operators_one_after_the_other(device: str, tokens: int, mma_type: str) -> None:
    """Dispatch by indexing, m_grouped_fp8(_fp4)_gemm_nt_contiguous, swiglu_cast_to_fp8, the second product, the sum."""
    case = MegaCase((tokens,), 6, 3, 512, 256, mma_type=mma_type)
    (buffer,), (weights,), (inputs,) = case.buffers(device), case.weights(), case.inputs()
    inputs, weights = to_device(inputs, device), to_device(weights, device)
    case.write([buffer], [inputs])
    y = call(case, buffer, weights, tokens)
    order = inputs.topk_idx.flatten().argsort(stable=True)
    rows, groups = order // case.topk, inputs.topk_idx.flatten()[order].int()
    l1 = torch.stack([torch.cat(mega_moe._separate(w)) for w in weights.l1.view(torch.uint8)]).view(weights.l1.dtype)
    x = inputs.x.view(torch.uint8)[rows].view(inputs.x.dtype)
    ends = torch.bincount(groups, minlength=case.num_experts).cumsum(0).int()
    product, l1_sf, options = deep_gemm_ops.m_grouped_fp8_gemm_nt_contiguous, weights.l1_sf, {}
    if case.is_fp4:
        product = functools.partial(deep_gemm_ops.m_grouped_fp8_fp4_gemm_nt_contiguous, recipe=[1, 1, 32])
        l1_sf = torch.stack([torch.cat(mega_moe._separate(sf)) for sf in l1_sf])
        options = {"gran_k": 32, "use_packed_ue8m0": True}
    both = product(x, inputs.x_sf[rows], l1, l1_sf, ends, layout="offsets")
    factors = inputs.topk_weights.flatten()[order]
    h, h_sf = deep_gemm_ops.swiglu_cast_to_fp8(both, topk_weights=factors, **options)
    results = product(h, h_sf, weights.l2, weights.l2_sf, ends, layout="offsets")
    combined = torch.empty_like(results)
    combined[order] = results
    expected = sum(combined.view(tokens, case.topk, -1)[:, c].float() for c in range(case.topk)).bfloat16()
    assert_close(y, expected, tol=4e-3)
    if device == "cuda" and not case.is_fp4:  # products with FP4 weights have rows that sum in other orders
        assert same_bits(y, expected)


def test_result_given(device: str) -> None:
    """y in rows with gaps; what lies around it is left alone."""
    case = MegaCase((5,), 4, 2)
    (buffer,), (weights,), (inputs,) = case.buffers(device), case.weights(), case.inputs()
    case.write([buffer], [to_device(inputs, device)])
    around = torch.full((7, case.hidden + 16), 7.0, dtype=torch.bfloat16, device=device)
    y = around[1:6, 8 : 8 + case.hidden]
    assert call(case, buffer, to_device(weights, device), 5, y=y) is y
    case.check([y.cpu()], [inputs], [weights])
    y.fill_(7.0)
    assert (around == 7.0).all()


def test_weights_are_interleaved() -> None:
    l1 = torch.arange(48.0)[None, :, None].expand(2, 48, 3)
    interleaved, l2 = deep_gemm_ops.transform_weights_for_mega_moe(l1, l1)
    first = [*range(8), *range(24, 32), *range(8, 16), *range(32, 40), *range(16, 24), *range(40, 48)]
    assert interleaved[1, :, 2].tolist() == first and l2 is l1
    values, sf = l1.to(torch.float8_e4m3fn), torch.ones(2, 1, 1)
    (quantised, scales), pair = deep_gemm_ops.transform_weights_for_mega_moe((values, sf), (values, sf))
    assert same_bits(quantised, interleaved.to(torch.float8_e4m3fn)) and scales is sf and pair[0] is values
    with pytest.raises(RuntimeError, match="l1_weights has rows 24, expected a multiple of 16"):
        deep_gemm_ops.transform_weights_for_mega_moe(l1[:, :24], l1)


def test_fp4_weights_and_their_scales() -> None:
    """Any form of scales becomes words in the order of the rows, stride 1 along them."""
    random = generator(5)
    l1 = torch.randint(0, 256, (2, 256, 128), generator=random, dtype=torch.uint8)
    l2 = torch.randint(0, 256, (2, 128, 128), generator=random, dtype=torch.uint8)
    exponents = [torch.randint(0, 255, (2, rows, 8), generator=random, dtype=torch.uint8) for rows in (256, 128)]
    e8m0 = [x.view(torch.float8_e8m0fnu) for x in exponents]
    forms = [e8m0, [reference.scales_to_float32(x, 8) for x in e8m0], [x.view(torch.int32) for x in exponents]]
    for sf1, sf2 in forms:
        for dtype in (torch.uint8, torch.int8, torch.float4_e2m1fn_x2):
            pairs = deep_gemm_ops.transform_weights_for_mega_moe((l1.view(dtype), sf1), (l2.view(dtype), sf2))
            (values1, words1), (values2, words2) = pairs
            assert values1.dtype == dtype and values2.view(torch.uint8).equal(l2)
            assert words1.shape == (2, 256, 2) and words1.stride() == (512, 1, 256) and words2.stride() == (256, 1, 128)
            for expert in range(2):
                assert torch.cat(mega_moe._separate(values1[expert].view(torch.uint8))).equal(l1[expert])
                assert torch.cat(mega_moe._separate(words1[expert])).equal(exponents[0][expert].view(torch.int32))
            assert words2.equal(exponents[1].view(torch.int32))
    odd = deep_gemm_ops.transform_weights_for_mega_moe((l1, forms[1][0]), (l2, torch.full((2, 128, 8), 0.75)))[1][1]
    assert (odd == -1).all()  # no power of two: four times 255
    with pytest.raises(RuntimeError, match="scales has dtype float16, expected float32, float8_e8m0fnu or int32"):
        deep_gemm_ops.transform_weights_for_mega_moe((l1, forms[1][0].half()), (l2, forms[1][1]))


def test_reference_against_plain_matrices() -> None:
    """The specification, without its roundings, is the layer as one would write it."""
    random = generator(3)
    tokens, hidden, intermediate = 7, 256, 128
    x = torch.randn(tokens, hidden, generator=random)
    w1, w2 = (
        torch.randn(2, 2 * intermediate, hidden, generator=random),
        torch.randn(2, hidden, intermediate, generator=random),
    )
    idx, weights = torch.tensor([[0, 1]]).repeat(tokens, 1), torch.rand(tokens, 2, generator=random)
    (l1, l2), y = mega_moe.transform_weights_for_mega_moe(w1, w2), torch.zeros(tokens, hidden, dtype=torch.float64)
    for e in range(2):
        gate, up = (x.double() @ w1[e].double().t()).chunk(2, dim=1)
        y += weights[:, e, None] * (torch.nn.functional.silu(gate) * up @ w2[e].double().t())
    results = mega_moe.reference_experts(x, None, idx, weights, l1, None, l2, None, exact=True)
    assert_close(results.sum(1), y, tol=1e-12)
    # FP4 weights that are these numbers, and tokens that are FP8's.
    signs = [torch.randint(0, 2, w.shape, generator=random) for w in (w1, w2)]  # 0.5 is code 1, -0.5 is 9
    packed = [(1 + 8 * s[..., 0::2] | (1 + 8 * s[..., 1::2]) << 4).to(torch.uint8) for s in signs]
    scales = [torch.exp2(torch.randint(-3, 4, (*s.shape[:2], s.shape[2] // 32), generator=random)) for s in signs]
    plain = [(0.5 - s.double()) * sf.double().repeat_interleave(32, dim=2) for s, sf in zip(signs, scales)]
    (l1, l1_sf), (l2, l2_sf) = mega_moe.transform_weights_for_mega_moe(*zip(packed, scales))
    values, x_sf = reference.per_token_cast_to_fp8(x, gran_k=32, use_packed_ue8m0=True)
    x, y = reference.dequantize(values, x_sf, 1, 32, torch.float64), torch.zeros_like(y)
    for e in range(2):
        gate, up = (x @ plain[0][e].t()).chunk(2, dim=1)
        y += weights[:, e, None] * (torch.nn.functional.silu(gate) * up @ plain[1][e].t())
    results = mega_moe.reference_experts(values, x_sf, idx, weights, l1, l1_sf, l2, l2_sf, exact=True)
    assert_close(results.sum(1), y, tol=1e-12)


def test_buffers(device: str) -> None:
    """Sizes and names that callers of the public package know, and buffers that do not fit the call."""
    get = deep_gemm_ops.get_symm_buffer_for_mega_moe
    buffer = get(None, 8, 16, 2, 256, 128, device=device)  # the public package's default: FP4 weights
    assert buffer.mma_type == "fp8xfp4" and buffer.x_sf.dtype == torch.int32 and buffer.x_sf.shape == (16, 2)
    buffer = get(None, 8, 16, 2, 256, 128, mma_type="fp8xfp8", device=device)
    assert buffer.x.shape == (16, 256) and buffer.x.dtype == torch.float8_e4m3fn
    assert buffer.x_sf.shape == (16, 2) and buffer.topk_idx.dtype == torch.int64
    assert buffer.topk_weights.shape == buffer.topk_idx.shape == (16, 2)
    assert list(buffer.handle.buffer_ptrs) == [buffer.buffer.data_ptr()] and not buffer.buffer.any()
    assert (buffer.num_max_tokens_per_rank, buffer.num_experts, buffer.num_topk) == (16, 8, 2)
    assert get(None, 8, 16, 2, 256, 128, False, "bf16xbf16", device=device).x_sf is None
    buffer.destroy()
    weights = MegaCase((1,), 8).weights()[0]
    with pytest.raises(RuntimeError, match="sym_buffer has state destroyed, expected a buffer"):
        call(MegaCase((1,), 8), buffer, weights, 1)
    for arguments, text in [
        ((8, 16, 2, 200, 128), "hidden has value 200, expected a positive multiple of 128"),
        ((8, 0, 2, 256, 128), "num_max_tokens_per_rank has value 0, expected a positive integer"),
        ((8, 16, 9, 256, 128), "num_topk has value 9, expected 1 to num_experts"),
        ((600, 16, 2, 256, 128), "num_experts has value 600, expected at most 512 for each rank"),
        ((8, 2**30, 2, 256, 128), f"num_max_tokens_per_rank has value {2**30}, expected fewer than 2.31 rows in all"),
        (
            (8, 16, 2, 256, 128, True, "bf16xbf16"),
            "use_fp8_dispatch has value True, expected False .mma_type is bf16xbf16",
        ),
        ((8, 16, 2, 256, 128, None, "fp4xfp4"), "mma_type has value fp4xfp4, expected fp8xfp8, bf16xbf16 or fp8xfp4"),
        ((8, 16, 2, 256, 128, None, "fp8xfp8", "gelu"), "activation has value gelu, expected swiglu"),
    ]:
        with pytest.raises(RuntimeError, match=f"get_symm_buffer_for_mega_moe: {text}"):
            get(None, *arguments, device=device)


def test_choices_that_the_host_can_see() -> None:
    case = MegaCase((3,), 4, 2)
    (buffer,), (weights,), (inputs,) = case.buffers(), case.weights(), case.inputs()
    for idx, text in [
        ([0, 4], "topk_idx has value 4, expected -1 to 3"),
        ([-2, 1], "topk_idx has value -2, expected -1 to 3"),
        ([2, 2], r"topk_idx has value \[2, 2\], expected an expert once for each token"),
    ]:
        case.write([buffer], [inputs])
        buffer.topk_idx[1] = torch.tensor(idx)
        with pytest.raises(RuntimeError, match=f"fp8_mega_moe: {text}"):
            call(case, buffer, weights, 3)
    case.write([buffer], [inputs])
    case.check([call(case, buffer, weights, 3)], [inputs], [weights])


def test_a_rank_that_does_not_come() -> None:
    """On the CPU; on the emulator: test_mega_moe_emulated.py."""
    case = MegaCase((3, 2), 4, 2)
    buffers, weights = case.buffers(), case.weights()
    case.write(buffers, case.inputs())
    with pytest.raises(RuntimeError, match=r"fp8_mega_moe: rank 0 timed out waiting for rank 1 \(step enter\)"):
        call(case, buffers[0], weights[0], 3, timeout_ms=50)
    buffers[0].buffer[1024:2048].view(torch.int64)[1] = 1 << 32 | 2
    with pytest.raises(RuntimeError, match=r"fp8_mega_moe: rank 0 timed out waiting for rank 1 \(step leave\)"):
        call(case, buffers[0], weights[0], 3, timeout_ms=50)


def arguments(device: str, op: str) -> dict[str, Any]:
    overload, values, keywords = next(s for s in samples(device) if s[0]._opname == op)
    names = [argument.name for argument in overload._schema.arguments]
    return {**dict(zip(names, values)), **keywords}


@pytest.fixture
def device_of_arguments(device_or_fake: str) -> str:
    return device_or_fake


def test_bad_input(device_of_arguments: str) -> None:
    stats = "cumulative_local_expert_recv_stats"
    changes = {
        "l1 of bfloat16": changed(l1=lambda p: p["l1"].to(torch.bfloat16)),
        "l2 of rank 2": changed(l2=lambda p: p["l2"][0]),
        "l1_sf of float16": changed(l1_sf=lambda p: p["l1_sf"].half()),
        "buffer of int8": changed(buffer=lambda p: p["buffer"].view(torch.int8)),
        "l2 elsewhere": changed(l2=lambda p: other_device(p["l2"])),
        "no ranks": changed(buffer_ptrs=lambda p: []),
        "rank": changed(rank=lambda p: 1),
        "experts for two ranks": changed(buffer_ptrs=lambda p: p["buffer_ptrs"] * 2),
        "more tokens than there is room": changed(num_tokens=lambda p: 9),
        "fewer than none": changed(num_tokens=lambda p: -1),
        "topk": changed(num_topk=lambda p: 0),
        "clamp": changed(activation_clamp=lambda p: 0.0),
        "time": changed(timeout_ms=lambda p: 0),
        "gates without ups": changed(l1=lambda p: p["l1"][:, :128].clone()),
        "hidden": changed(l1=lambda p: p["l1"][:, :, :192].clone()),
        "experts of l2": changed(l2=lambda p: p["l2"][:2]),
        "columns of l1": changed(
            l1=lambda p: p["l1"].view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(p["l1"].dtype)
        ),
        "l1_sf too small": changed(l1_sf=lambda p: p["l1_sf"][:, :1]),
        "l2_sf too large": changed(l2_sf=lambda p: p["l2_sf"].repeat(1, 2, 1)),
        "buffer too small": changed(buffer=lambda p: p["buffer"][:-1]),
        "statistics": changed(**{stats: lambda p: torch.zeros(4, dtype=torch.int32, device=p["l1"].device)}),
    }
    assert_expected_inline(
        messages(
            torch.ops.deep_gemm.fp8_mega_moe, lambda: arguments(device_of_arguments, "fp8_mega_moe"), changes
        ).replace("cuda:0", "cpu"),
        """\
l1 of bfloat16: fp8_mega_moe: l1 has dtype bfloat16, expected float8_e4m3fn
l2 of rank 2: fp8_mega_moe: l2 has rank 2, expected 3
l1_sf of float16: fp8_mega_moe: l1_sf has dtype float16, expected float32
buffer of int8: fp8_mega_moe: buffer has dtype int8, expected uint8
l2 elsewhere: fp8_mega_moe: l2 has device meta, expected cpu (the device of l1)
no ranks: fp8_mega_moe: buffer_ptrs has length 0, expected 1 to 128
rank: fp8_mega_moe: rank has value 1, expected 0 to 0
experts for two ranks: fp8_mega_moe: num_experts has value 3, expected a positive multiple of the 2 ranks
more tokens than there is room: fp8_mega_moe: num_tokens has value 9, expected 0 to 8
fewer than none: fp8_mega_moe: num_tokens has value -1, expected 0 to 8
topk: fp8_mega_moe: num_topk has value 0, expected 1 to num_experts
clamp: fp8_mega_moe: activation_clamp has value 0.0, expected a positive number
time: fp8_mega_moe: timeout_ms has value 0, expected a positive integer
gates without ups: fp8_mega_moe: l1 has shape [3, 128, 256], expected [local experts, 2 * intermediate, hidden] = [3, 256, 256]
hidden: fp8_mega_moe: hidden has value 192, expected a positive multiple of 128
experts of l2: fp8_mega_moe: l2 has shape [2, 256, 128], expected [local experts, hidden, intermediate] = [3, 256, 128]
columns of l1: fp8_mega_moe: l1 has dimension-2 stride 256, expected 1
l1_sf too small: fp8_mega_moe: l1_sf has shape [3, 1, 2], expected [local experts, 2 * intermediate / 128, hidden / 128] = [3, 2, 2]
l2_sf too large: fp8_mega_moe: l2_sf has shape [3, 4, 1], expected [local experts, hidden / 128, intermediate / 128] = [3, 2, 1]
buffer too small: fp8_mega_moe: buffer has bytes 225279, expected at least 225280
statistics: fp8_mega_moe: cumulative_local_expert_recv_stats has shape [4], expected [local experts] = [3]""",
    )


@pytest.mark.skipif(os.environ.get("HOST_OPS_MAJOR") != "10", reason="asks the operators' C++: test_host_ops.py")
def test_kernels_of_sm100() -> None:
    """FP8 weights with FP32 scales have none, and the error says what has; FP4 weights begin where TMA can unpack them."""
    run = torch.ops.deep_gemm
    text = r"fp8_mega_moe: l1 has architecture sm_100, expected sm_90 \(.*fp8_fp4_mega_moe\)"
    with pytest.raises(RuntimeError, match=text):
        run.fp8_mega_moe(**arguments("cpu", "fp8_mega_moe"))
    for op in ("bf16_mega_moe", "fp8_fp4_mega_moe"):
        getattr(run, op)(**arguments("cpu", op))
    given = arguments("cpu", "fp8_fp4_mega_moe")
    memory = torch.zeros(given["l1"].numel() + 16 + 32, dtype=torch.uint8)
    start = -memory.data_ptr() % 32 + 16
    given["l1"] = memory[start : start + given["l1"].numel()].view(given["l1"].shape)
    with pytest.raises(RuntimeError, match="fp8_fp4_mega_moe: l1 has base address 16 modulo 32 bytes, expected 0"):
        run.fp8_fp4_mega_moe(**given)


def test_bad_input_of_fp4(device_of_arguments: str) -> None:
    changes = {
        "l1 of FP8": changed(l1=lambda p: p["l1"].view(torch.float8_e4m3fn)),
        "l1_sf of float32": changed(l1_sf=lambda p: p["l1_sf"].float()),
        "experts of l2": changed(l2=lambda p: p["l2"][:2]),
        "hidden": changed(l1=lambda p: p["l1"][:, :, :96].clone()),
        "l1_sf too small": changed(l1_sf=lambda p: p["l1_sf"][:, :128]),
        "l1_sf K-major": changed(l1_sf=lambda p: p["l1_sf"].contiguous()),
        "l2_sf of a scale for each 32": changed(l2_sf=lambda p: p["l2_sf"].repeat(1, 1, 4)),
        "buffer too small": changed(buffer=lambda p: p["buffer"][:-1]),
    }
    assert_expected_inline(
        messages(
            torch.ops.deep_gemm.fp8_fp4_mega_moe, lambda: arguments(device_of_arguments, "fp8_fp4_mega_moe"), changes
        ),
        """\
l1 of FP8: fp8_fp4_mega_moe: l1 has dtype float8_e4m3fn, expected uint8, int8 or float4_e2m1fn_x2
l1_sf of float32: fp8_fp4_mega_moe: l1_sf has dtype float32, expected int32
experts of l2: fp8_fp4_mega_moe: l2 has shape [2, 256, 64], expected [local experts, hidden, intermediate / 2] = [3, 256, 64]
hidden: fp8_fp4_mega_moe: hidden has value 192, expected a positive multiple of 128
l1_sf too small: fp8_fp4_mega_moe: l1_sf has shape [3, 128, 2], expected [local experts, 2 * intermediate, hidden / 128] = [3, 256, 2]
l1_sf K-major: fp8_fp4_mega_moe: l1_sf has strides [512, 2, 1], expected [512, 1, 256] (MN-major, 16-byte aligned)
l2_sf of a scale for each 32: fp8_fp4_mega_moe: l2_sf has shape [3, 256, 4], expected [local experts, hidden, intermediate / 128] = [3, 256, 1]
buffer too small: fp8_fp4_mega_moe: buffer has bytes 421887, expected at least 421888""",
    )


def test_bad_input_of_bf16(device_of_arguments: str) -> None:
    changes = {
        "l1 of float32": changed(l1=lambda p: p["l1"].float()),
        "out of float32": changed(out=lambda p: torch.zeros(5, 256, device=p["l1"].device)),
        "out too small": changed(out=lambda p: torch.zeros(4, 256, dtype=torch.bfloat16, device=p["l1"].device)),
        "out with ragged rows": changed(
            out=lambda p: torch.zeros(5, 260, dtype=torch.bfloat16, device=p["l1"].device)[:, :256]
        ),
    }

    def good() -> dict[str, Any]:
        base = arguments(device_of_arguments, "bf16_mega_moe")
        return {**base, "out": torch.zeros(5, 256, dtype=torch.bfloat16, device=base["l1"].device)}

    assert_expected_inline(
        messages(torch.ops.deep_gemm.bf16_mega_moe.out, good, changes),
        """\
l1 of float32: bf16_mega_moe: l1 has dtype float32, expected bfloat16
out of float32: bf16_mega_moe: out has dtype float32, expected bfloat16
out too small: bf16_mega_moe: out has shape [4, 256], expected [num_tokens, hidden] = [5, 256]
out with ragged rows: bf16_mega_moe: out has row stride 520 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)""",
    )


def test_no_derivative() -> None:
    case = MegaCase((2,), mma_type="bf16xbf16")
    (buffer,), (weights,) = case.buffers(), case.weights()
    weights = dataclasses.replace(weights, l1=weights.l1.requires_grad_())
    with pytest.raises(RuntimeError, match="bf16_mega_moe: l1 has requires_grad True, expected False"):
        call(case, buffer, weights, 2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(device: str, backend: str) -> None:
    """Quantisation, copies into the buffer and the layer in one graph, for any number of tokens."""
    case = MegaCase((8,), 4, 2)
    (buffer,), (weights,) = case.buffers(device), case.weights()
    weights = to_device(weights, device)

    def layer(
        x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, memory: torch.Tensor
    ) -> torch.Tensor:
        tokens = x.shape[0]
        values, sf = deep_gemm_ops.per_token_cast_to_fp8(x)
        views = mega_moe._views(memory, buffer.shape)
        views.x.view(torch.uint8)[:tokens] = values.view(torch.uint8)
        views.x_sf[:tokens] = sf
        views.topk_idx[:tokens] = topk_idx
        views.topk_weights[:tokens] = topk_weights
        sizes = (memory, buffer.handle.buffer_ptrs, 0, tokens, 8, 4, 2)
        return torch.ops.deep_gemm.fp8_mega_moe(*weights.tensors(), *sizes) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (3, 8, 5):
        inputs = to_device(MegaCase((tokens,), 4, 2).inputs()[0], device)
        x = reference.dequantize(inputs.x, inputs.x_sf, 1, 128).bfloat16()
        expected = layer(x, inputs.topk_idx, inputs.topk_weights, buffer.buffer)
        assert same_bits(compiled(x, inputs.topk_idx, inputs.topk_weights, buffer.buffer), expected), tokens


def test_graph(cuda: str) -> None:
    """A captured call replays with other inputs."""
    case = MegaCase((20,), 8, 3, calls=4)
    (buffer,), (weights,) = case.buffers(cuda), case.weights()
    on_device, y = to_device(weights, cuda), torch.empty(20, case.hidden, dtype=torch.bfloat16, device=cuda)
    case.write([buffer], [to_device(case.inputs()[0], cuda)])
    call(case, buffer, on_device, 20, y=y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(case, buffer, on_device, 20, y=y)
    for number in range(case.calls):
        (inputs,) = case.inputs(number)
        case.write([buffer], [to_device(inputs, cuda)])
        graph.replay()
        torch.cuda.synchronize()
        case.check([y.cpu()], [inputs], [weights])


@pytest.mark.parametrize("mma_type", mega_moe.MMA_TYPES)
def test_large_layer(cuda: str, mma_type: str) -> None:
    """Every height of blocks, and of FP4's tiles, at sizes of a real model. The reference, too, is computed on the GPU."""
    weights = None
    for tokens in (8, 32, 80, 400):
        case = MegaCase((tokens,), 4, 2, 7168, 2048, mma_type=mma_type)
        weights = weights or to_device(case.weights()[0], cuda)
        (buffer,), inputs = case.buffers(cuda), to_device(case.inputs()[0], cuda)
        case.write([buffer], [inputs])
        y = call(case, buffer, weights, tokens)
        case.check([y], [inputs], [weights])
        for tile_rows in (128, 256):
            with _capi.tune_mega_moe(tile_rows=tile_rows):
                assert same_bits(call(case, buffer, weights, tokens), y), (tokens, tile_rows)


def process_cases(ranks: int, mma_type: str) -> list[MegaCase]:
    """Calls of one layer, in the same buffers: other tokens, of some ranks none, and other choices."""
    if ranks == 3:  # on the CPU, or all on one GPU
        return [MegaCase((4, 0, 7), 6, 3, max_tokens=8, mma_type=mma_type, calls=2)]
    tokens = {
        2: [(40, 0), (1, 300), (150, 33), (7, 90), (5, 5)],
        4: [(40, 0, 150, 1), (0, 300, 3, 33), (64, 64, 64, 64), (7, 0, 0, 90), (5, 5, 5, 5)],
    }[ranks]
    sizes = (4 * ranks, 3, 1024, 512, 300, mma_type)
    routings = ("random", "masked", "same", "wild", "none")
    return [MegaCase(of_ranks, *sizes, routing=routing, calls=3) for of_ranks, routing in zip(tokens, routings)]


def process(rank: int, ranks: int, folder: str, device: str, mma_types: tuple[str, ...]) -> None:
    """A rank: on the CPU, with all others on the GPU "cuda", or with "cuda:" on a GPU of its own. A file says how far it
    has come."""
    progress = pathlib.Path(folder) / f"progress {rank}"
    progress.write_text("the rendezvous")
    torch.set_num_threads(4 if device == "cuda:" else 1)
    backend, current = "gloo", [device]  # devices that are the current one, in turns
    if device == "cuda:":
        backend, device, current = "nccl", f"cuda:{rank}", [f"cuda:{rank}", f"cuda:{(rank + 1) % ranks}"]
        for other in reversed(current):  # not while its rank's kernel waits for this one
            torch.cuda.set_device(other)
            torch.cuda.synchronize()
    else:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    where, wait = f"file://{folder}/rendezvous", datetime.timedelta(seconds=20)
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=ranks, timeout=wait)
    if current == ["cuda"]:
        progress.write_text("CUDA's initialisation")
        deep_gemm_ops.set_num_sms(torch.cuda.get_device_properties(0).multi_processor_count // ranks)
    results: dict[Any, Any] = {}
    for mma_type in mma_types:
        progress.write_text(f"the buffer of {mma_type}")
        cases = process_cases(ranks, mma_type)
        case = cases[0]
        sizes = (case.num_experts, case.max_tokens, case.topk, case.hidden, case.intermediate)
        options: dict[str, Any] = {"mma_type": mma_type, "device": device}
        buffer = deep_gemm_ops.get_symm_buffer_for_mega_moe(dist.group.WORLD, *sizes, **options)
        weights = to_device(case.weights()[rank], device)
        stats = torch.zeros(case.num_experts // ranks, dtype=torch.int32, device=device)
        more: dict[str, Any] = {"timeout_ms": 10_000, "cumulative_local_expert_recv_stats": stats}
        # All inputs first, so that on GPUs of their own ranks run as far ahead of each other as the kernels let them.
        calls = [(index, number) for index in range(len(cases)) for number in range(case.calls)]
        inputs = {(i, number): to_device(cases[i].inputs(number)[rank], device) for i, number in calls}
        for at, (index, number) in enumerate(calls):
            progress.write_text(f"call {number} of {cases[index].routing} choices, {mma_type}")
            with contextlib.nullcontext() if device == "cpu" else torch.cuda.device(current[at % len(current)]):
                cases[index].write([buffer], [inputs[index, number]])
                y = call(cases[index], buffer, weights, cases[index].tokens[rank], **more)
            assert y.device == buffer.buffer.device
            results[mma_type, index, number] = y
        results[mma_type, "stats"] = stats.clone()
        if len(current) > 1:
            progress.write_text(f"the capture of {mma_type}")
            y = torch.empty(case.tokens[rank], case.hidden, dtype=torch.bfloat16, device=device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call(case, buffer, weights, case.tokens[rank], y=y, **more)
            for number in range(case.calls):
                progress.write_text(f"replay {number} of {mma_type}")
                case.write([buffer], [inputs[0, number]])
                graph.replay()
                results[mma_type, "graph", number] = y.clone()
        results = {key: y.cpu() for key, y in results.items()}
        progress.write_text(f"the end of {mma_type}")
        dist.barrier()
        buffer.destroy()
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()
    progress.write_text("its own end")


def join(context: Any, folder: pathlib.Path, seconds: float) -> None:
    """Waits for all processes, or kills them when that takes too long, and says what they were waiting for."""
    deadline = time.monotonic() + seconds
    while not context.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() > deadline:
            ranks = range(len(context.processes))
            stuck = [f"rank {rank} at {(folder / f'progress {rank}').read_text()}" for rank in ranks]
            for of_rank in context.processes:
                of_rank.kill()
            pytest.fail(f"not done after {seconds} s: {', '.join(stuck)}")


def run_processes(
    ranks: int, folder: pathlib.Path, device: str, mma_types: tuple[str, ...], seconds: float
) -> list[dict[Any, torch.Tensor]]:
    """What each rank has written down, calls compared with the reference, which runs on a GPU if there is one."""
    for rank in range(ranks):
        (folder / f"progress {rank}").write_text("its start")
    arguments = (ranks, str(folder), device, mma_types)
    join(torch.multiprocessing.spawn(process, arguments, nprocs=ranks, join=False), folder, seconds)
    results = [torch.load(folder / str(rank)) for rank in range(ranks)]
    where = "cpu" if device == "cpu" else "cuda"
    for mma_type in mma_types:
        cases = process_cases(ranks, mma_type)
        weights = [to_device(w, where) for w in cases[0].weights()]
        for index, case in enumerate(cases):
            for number in range(case.calls):
                y = [of_rank[mma_type, index, number].to(where) for of_rank in results]
                case.check(y, [to_device(i, where) for i in case.inputs(number)], weights)
        experts = cases[0].num_experts
        inputs = [i for case in cases for number in range(case.calls) for i in case.inputs(number)]
        chosen = torch.cat([i.topk_idx.flatten() for i in inputs])
        received = torch.bincount(chosen[(chosen >= 0) & (chosen < experts)], minlength=experts)
        assert torch.cat([of_rank[mma_type, "stats"] for of_rank in results]).tolist() == received.tolist()
    return results


def test_processes(device: str, tmp_path: pathlib.Path) -> None:
    """Memory that processes share. On one GPU their kernels take turns, so that waiting costs slices of time."""
    seconds = 50 if device == "cuda" else 150  # of which nearly all is the processes' start
    run_processes(3, tmp_path, device, ("fp8xfp8", "fp8xfp4"), seconds)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("deep_gemm_mega_moe_")]


def test_several_gpus(several_gpus: int, tmp_path: pathlib.Path) -> None:
    """A GPU for each rank: symmetric memory over NCCL's group, calls that nothing holds up, graphs."""
    ranks = several_gpus
    mma_types = mega_moe.MMA_TYPES if torch.cuda.get_device_capability()[0] == 9 else ("bf16xbf16", "fp8xfp4")
    results = run_processes(ranks, tmp_path, "cuda:", mma_types, 120)
    for of_rank in results:
        for mma_type in mma_types:
            for number in range(process_cases(ranks, mma_type)[0].calls):
                assert same_bits(of_rank[mma_type, "graph", number], of_rank[mma_type, 0, number])


def leave_alone(rank: int, folder: str) -> None:
    """Rank 1 never calls; rank 0 says when it has given up."""
    progress = [pathlib.Path(folder) / f"progress {r}" for r in range(2)]
    torch.cuda.set_device(rank)
    wait = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=wait)
    case = MegaCase((3, 2), 4, 2, mma_type="bf16xbf16")
    sizes = (case.num_experts, 3, case.topk, case.hidden, case.intermediate)
    buffer = deep_gemm_ops.get_symm_buffer_for_mega_moe(
        dist.group.WORLD, *sizes, mma_type=case.mma_type, device=f"cuda:{rank}"
    )
    deadline = time.monotonic() + 20
    if rank == 0:
        case.write([buffer], [to_device(case.inputs()[0], "cuda")])
        progress[0].write_text("the call")
        call(case, buffer, to_device(case.weights()[0], "cuda"), 3, timeout_ms=500)
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            progress[0].write_text(f"given up: {error}")
    while not progress[0].read_text().startswith("given up") and time.monotonic() < deadline:
        time.sleep(0.05)
    os._exit(0)  # a device on which an assertion failed cannot be shut down in order


def test_a_gpu_that_does_not_come(
    two_cuda_devices: tuple[str, str], tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for rank in range(2):
        (tmp_path / f"progress {rank}").write_text("its start")
    join(torch.multiprocessing.spawn(leave_alone, (str(tmp_path),), nprocs=2, join=False), tmp_path, 50)
    assert "device-side assert" in (tmp_path / "progress 0").read_text()
    printed = "".join(capfd.readouterr())
    assert "deep_gemm Mega MoE: timed out waiting for rank:1" in printed and "enter: its inputs are there" in printed


def idle(rank: int) -> None:
    time.sleep(60)


def test_processes_that_hang(tmp_path: pathlib.Path) -> None:
    """The test above ends with a message that names the ranks and where they are."""
    for rank in range(3):
        (tmp_path / f"progress {rank}").write_text("its start")
    context = torch.multiprocessing.spawn(idle, nprocs=3, join=False)
    with pytest.raises(pytest.fail.Exception, match="not done after 0.5 s: rank 0 at its start, rank 1 at its start"):
        join(context, tmp_path, 0.5)
    for of_rank in context.processes:
        of_rank.join(10)
        assert of_rank.exitcode == -9

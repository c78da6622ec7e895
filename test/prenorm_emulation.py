"""Runs tf32_hc_prenorm_gemm under the PTX emulator, through the library's own host code.

`PrenormCase` is a problem in one line of text that repeats a failure:

    python test/prenorm_emulation.py "PrenormCase(130, 24, 300, num_sms=3, seed=2)"
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import sys
from collections.abc import Iterator

import torch

from deep_gemm_ops import _capi, prenorm_gemm

import ptx_emulator
from common import assert_close, assert_equal, ceil_div, generator, same_bits, strided
from gemm_emulation import _LAUNCH, BUDGET, _region, units


class Plan(ctypes.Structure):
    """PrenormPlan of src/host/prenorm_gemm.h."""

    _fields_ = [("num_splits", ctypes.c_int64), ("tile_rows", ctypes.c_int64), ("in_cluster", ctypes.c_bool)]


class _Problem(ctypes.Structure):
    """PrenormGemmProblem of src/host/prenorm_gemm.h."""

    _fields_ = [
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("a", ctypes.c_void_p),
        ("a_stride", ctypes.c_int64),
        ("b", ctypes.c_void_p),
        ("b_stride", ctypes.c_int64),
        ("d", ctypes.c_void_p),
        ("d_split_stride", ctypes.c_int64),
        ("d_row_stride", ctypes.c_int64),
        ("sqr_sum", ctypes.c_void_p),
        ("sqr_split_stride", ctypes.c_int64),
        ("plan", Plan),
        ("workspace", ctypes.c_void_p),
    ]


def prenorm_plan(m: int, n: int, k: int, num_sms: int, arch: int = 90) -> Plan:
    """What the host chooses for a result that is one sum."""
    plan = Plan()
    function = _capi.library().dg_prenorm_plan
    function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 2 + [ctypes.POINTER(Plan)]
    function(m, n, k, arch, num_sms, ctypes.byref(plan))
    return plan


def _workspace(m: int, n: int, num_splits: int) -> torch.Tensor:
    function = _capi.library().dg_prenorm_workspace_bytes
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int64] * 3
    return torch.full((function(m, n, num_splits) // 4,), math.nan)


def run_prenorm(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    sqr_sum: torch.Tensor,
    *,
    num_splits: int | None = None,
    num_sms: int = 132,
    arch: int = 90,
    plan: Plan | None = None,
    module: ptx_emulator.Module | None = None,
    **options: int,
) -> list[tuple[str, ptx_emulator.Stats]]:
    """The operator's launches: each kernel's name (a part of the mangled one) and what the emulator counted.

    ``plan`` replaces the host's choice. Operands are read-only, memory between tensors does not exist, and the
    workspace is NaN before the first launch.
    ``module`` holds another version of the product's kernel; ``options`` are those of ``Module.launch``.
    """
    (m, k), n = a.shape, b.shape[0]
    plan = plan or (Plan(num_splits) if num_splits else prenorm_plan(m, n, k, num_sms, arch))
    workspace = _workspace(m, n, 1 if num_splits or plan.in_cluster else plan.num_splits)
    problem = _Problem(
        m=m,
        n=n,
        k=k,
        a=a.data_ptr(),
        a_stride=a.stride(0),
        b=b.data_ptr(),
        b_stride=b.stride(0),
        d=d.data_ptr(),
        d_split_stride=d.stride(0) if num_splits else 0,
        d_row_stride=d.stride(-2),
        sqr_sum=sqr_sum.data_ptr(),
        sqr_split_stride=sqr_sum.stride(0) if num_splits else 0,
        plan=plan,
        workspace=workspace.data_ptr() if workspace.numel() else None,
    )
    tensors = [("a", a, True), ("b", b, True), ("d", d, False), ("sqr_sum", sqr_sum, False)]
    tensors.append(("workspace", workspace, False))
    buffers = [_region(x, name, read_only) for name, x, read_only in tensors if x.numel()]
    result: list[tuple[str, ptx_emulator.Stats]] = []
    failure: list[BaseException] = []

    def launch(kernel, grid, block, cluster, shared_bytes, params, params_bytes):
        try:
            name = kernel.decode()
            ((compiled, entry),) = [(m, e) for _, m in units(f"sm{arch}_prenorm") for e in m.entries if name in e]
            changed = module if module is not None and entry in module.entries else compiled
            stats = changed.launch(
                entry,
                grid=grid,
                block=block,
                cluster=cluster,
                smem=shared_bytes,
                args=[ctypes.string_at(params, params_bytes)],
                buffers=buffers,
                num_sms=num_sms,
                **options,
            )
            result.append((name, stats))
            return 0
        except BaseException as error:  # an exception cannot cross the C frames in between
            failure.append(error)
            return 1

    error = ctypes.create_string_buffer(4096)
    status = _capi.library().dg_run_prenorm_gemm(
        ctypes.byref(problem),
        arch,
        num_sms,
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


def special_products(device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    """(a, b, expected results) where one column of a and b multiplies each special value by each.

    Some factors are BF16 numbers, which leave nothing when their upper 16 bits are taken away, some overflow.
    """
    values = [math.nan, math.inf, -math.inf, 0.0, 1.0, -2.0, 1.0 + 2**-9, 3.0e38, -1.0e-30]
    x, y = torch.tensor(values, device=device).bfloat16()[:, None], torch.tensor(values, device=device)[:, None]
    for column in (0, 7):
        a = torch.nn.functional.pad(x, (column, 7 - column))
        b = torch.nn.functional.pad(y, (column, 7 - column))
        yield a, b, ((x.double() @ y.double().t()).float(), x.float().square().squeeze(1))


@dataclasses.dataclass(frozen=True)
class PrenormCase:
    """A problem, everything outside of its tensors poisoned with NaN.

    ``data`` is ``normal``, ``integer`` (results are exact), ``split`` (integers that need more than 8 bits of b) or
    ``special`` (integers, with NaN and Inf in a and b).
    """

    m: int
    n: int
    k: int
    num_splits: int | None = None
    data: str = "normal"
    num_sms: int = 8
    seed: int = 0  # of the schedule; the data depends on the rest
    arch: int = 90
    cluster: int = 0  # CTAs that add their parts up, one tile; 0: as the host chooses
    tile_rows: int = 0  # of such tiles

    @property
    def repro(self) -> str:
        default = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: value for name, value in dataclasses.asdict(self).items() if value != default[name]}
        arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f'python test/prenorm_emulation.py "PrenormCase({arguments})"'

    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        random = generator(hash((self.m, self.n, self.k)) % 2**32)
        if self.data == "normal":
            a, b = torch.randn(self.m, self.k, generator=random), torch.randn(self.n, self.k, generator=random)
        else:
            most = 2**15 if self.data == "split" else 3
            a = torch.randint(-1, 2, (self.m, self.k), generator=random).float()
            b = torch.randint(-most, most + 1, (self.n, self.k), generator=random).float()
        if self.data == "special":
            for x in (a, b):
                at = torch.randint(x.numel(), (4,), generator=random)
                x.view(-1)[at] = torch.tensor([math.nan, math.inf, -math.inf, math.inf])
        pad = 16
        a = strided(a.to(torch.bfloat16), ceil_div(self.k, 8) * 8 + pad, "cpu")
        b = strided(b, ceil_div(self.k, 4) * 4 + pad, "cpu") if self.n else torch.empty(0, self.k)
        return a, b

    def run(self, module: ptx_emulator.Module | None = None, **options: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the case and returns (d, sqr_sum); raises AssertionError or PtxError with a line that repeats it."""
        a, b = self.operands()
        lead = () if self.num_splits is None else (self.num_splits,)
        d_buffer = torch.full((*lead, self.m + 2, self.n + 3), math.nan)
        sqr_buffer = torch.full((*lead, self.m + 3), math.nan)
        d, sqr_sum = d_buffer[..., 1 : self.m + 1, 1 : self.n + 1], sqr_buffer[..., 1 : self.m + 1]
        options = {"budget": BUDGET, "seed": self.seed, **options}
        try:
            plan = Plan(self.cluster, self.tile_rows, True) if self.cluster else None
            options |= {"num_sms": self.num_sms, "arch": self.arch, "plan": plan}
            run_prenorm(a, b, d, sqr_sum, num_splits=self.num_splits, module=module, **options)
        except ptx_emulator.PtxError as error:
            raise ptx_emulator.PtxError(error.kind, f"{error}\nreproduce with: {self.repro}") from None
        expected = prenorm_gemm.reference(a, b, num_splits=self.num_splits, dtype=torch.float64)
        for actual, want, tol in zip((d, sqr_sum), expected, (2e-5, 2e-6)):
            if self.data == "normal":
                assert_close(actual, want, tol=tol, repro=self.repro)
            else:
                assert_equal(actual, want.float(), repro=self.repro)
        for buffer, inside in ((d_buffer, d), (sqr_buffer, sqr_sum)):
            rest = buffer.clone()
            rest.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(math.nan)
            assert same_bits(rest, torch.full_like(rest, math.nan)), f"wrote outside\nreproduce with: {self.repro}"
        return d, sqr_sum


def main() -> None:
    case = eval(sys.argv[1], {"PrenormCase": PrenormCase})
    case.run()
    print(f"passed: {case}")


if __name__ == "__main__":
    main()

"""AOTInductor packages with the library's operators, in Python and in the C++ program of examples/aoti.

On a CPU the operators have no implementation but Python's, so there the program runs a package whose operators come
from ``test_host_ops``: the library's C++ with stand-ins for its kernels. That is all of the path but the kernels:
schemas, the package's call of an operator, its arguments, results. On a GPU the program runs the example's package.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from deep_gemm_ops import _library
from deep_gemm_ops.export import aoti_compile_and_package
from deep_gemm_ops.layout import ceil_div

from common import ROOT, same_bits
from test_host_ops import library as host_ops_library

FOLDER = ROOT / "examples" / "aoti"
sys.path[:0] = [str(ROOT / "tools"), str(FOLDER)]
import make_package  # noqa: E402
import toolchain  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's C++ program, built as its CMakeLists.txt says."""
    try:
        cmake, ninja = toolchain.find_program("cmake"), toolchain.find_program("ninja")
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))
    build = tmp_path_factory.mktemp("aoti")
    torch_dir = Path(torch.__file__).parent
    options = [f"-DTORCH_DIR={torch_dir}", f"-DCMAKE_CXX_COMPILER={compiler()}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (
        [str(cmake), "-S", str(FOLDER), "-B", str(build), "-G", "Ninja", "-DCMAKE_CXX_FLAGS=-Wall -Werror", *options],
        [str(cmake), "--build", str(build)],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    program = build / "run_package"
    if b"libstdc++.so" not in program.read_bytes():
        pytest.skip(f"{compiler()} links libstdc++ statically: two of them in a process end in a segmentation fault")
    return program


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=300)


class Products(nn.Module):
    """A product of quantised weights, dense and by groups; PyTorch's own operations quantise the activations."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name, shape in (("dense", (96, 256)), ("groups", (3, 80, 256))):
            weight = torch.randn(*shape, generator=random).to(torch.float8_e4m3fn)
            scales = torch.rand(*shape[:-2], ceil_div(shape[-2], 128), 2, generator=random)
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = x.unflatten(1, (-1, 128))
        scales = blocks.abs().amax(2) / 448
        values = (blocks / scales[:, :, None]).flatten(1).to(torch.float8_e4m3fn)
        ends = torch.arange(1, 4, device=x.device, dtype=torch.int32) * (x.shape[0] // 3)
        ops = torch.ops.deep_gemm
        y = ops.fp8_gemm_nt(values, scales, self.dense, self.dense_scales)
        z = ops.m_grouped_fp8_gemm_nt_contiguous(
            values, scales, self.groups, self.groups_scales, ends, layout="offsets", recipe=[1, 128, 128]
        )
        return torch.cat((y, z), dim=1)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler()
    folder = tmp_path_factory.mktemp("products")
    inputs = [torch.randn(n, 256, generator=torch.Generator().manual_seed(n)) for n in (9, 64, 7)]
    make_package.write(Products(), inputs, folder)
    return folder


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler()
    folder = tmp_path_factory.mktemp("block")
    make_package.main([str(folder), "--device", "cpu"])
    return folder


@pytest.mark.parametrize("name", ["products", "block"])
def test_package_in_python(name: str, request: pytest.FixtureRequest) -> None:
    """The package calls the same operators in the same way as eager mode, for any number of tokens."""
    folder = request.getfixturevalue(name)
    model, cases = torch._inductor.aoti_load_package(str(folder / "model.pt2")), torch.load(folder / "cases.pt")
    assert len(cases) == 6
    for x, expected in zip(cases[::2], cases[1::2]):
        y = model(x)
        assert y.shape == expected.shape and y.dtype == expected.dtype
        # The block has BF16 between its layers, which compiled code rounds less often.
        bar = 2e-2 if name == "block" else 1e-6
        assert float((y.double() - expected.double()).norm() / expected.double().norm()) < bar


def test_program_runs_operators_in_cpp(program: Path, products: Path, tmp_path: Path) -> None:
    library, package, cases = host_ops_library(), products / "model.pt2", products / "cases.pt"
    result = run(program, library, package, cases)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].endswith("operators of deep_gemm registered")
    assert lines[1].endswith("loaded, compiled for cpu")
    assert [line.split()[0] for line in lines[2:5]] == ["9", "64", "7"]
    assert lines[5] == "all results agree"

    tensors = torch.load(cases)
    tensors[3] = tensors[3].clone()
    tensors[3][5] *= 1.5
    torch.save(tensors, tmp_path / "wrong.pt")
    result = run(program, library, package, tmp_path / "wrong.pt")
    assert result.returncode == 1
    assert "64 tokens" in result.stdout and "1 results differ" in result.stdout and result.stdout.count("WRONG") == 1


def test_program_loads_the_library_without_a_gpu(program: Path, block: Path, products: Path, tmp_path: Path) -> None:
    """Schemas are registered, the package loads, and what is missing is said: the CPU form of the first operator."""
    library = _library.library_path()
    if library is None:
        pytest.skip("built with DG_SKIP_CUDA_BUILD=1: no shared library")
    result = run(program, library, block / "model.pt2", block / "cases.pt")
    assert result.returncode == 1
    assert f"{len(_library.schemas())} operators of deep_gemm registered" in result.stdout
    assert "loaded, compiled for cpu" in result.stdout
    assert "Could not run 'deep_gemm::per_token_cast_to_fp8' with arguments from the 'CPU' backend" in result.stderr
    missing = run(program, tmp_path / "nothing.so", block / "model.pt2", block / "cases.pt")
    assert missing.returncode == 1 and "nothing.so: cannot open shared object file" in missing.stderr
    assert run(program).returncode == 2


def test_program_on_a_gpu(cuda: str, program: Path, tmp_path: Path) -> None:
    make_package.main([str(tmp_path), "--device", cuda])
    result = run(program, _library.library_path(), tmp_path / "model.pt2", tmp_path / "cases.pt")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "compiled for cuda" in result.stdout and "all results agree" in result.stdout


class Dense(nn.Module):
    def forward(self, *operands: torch.Tensor) -> torch.Tensor:
        return torch.ops.deep_gemm.fp8_gemm_nt(*operands)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="PyTorch 2.11 ends with a segmentation fault instead")
def test_packages_need_dtypes_written_out(tmp_path: Path) -> None:
    """Should PyTorch's own function become enough, this fails, and ``deep_gemm_ops.export`` can go."""
    compiler()
    values = torch.randn(16, 128).to(torch.float8_e4m3fn)
    operands = (values, torch.ones(16, 1), values, torch.ones(1, 1))
    program = torch.export.export(Dense(), operands)
    plain = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "plain.pt2"))
    with pytest.raises(RuntimeError, match="serialized argument type as_scalar_type for argument 5"):
        torch._inductor.aoti_load_package(plain)
    seen: list[str] = []
    path = aoti_compile_and_package(
        torch.export.export(Dense(), operands),
        package_path=tmp_path / "ours.pt2",
        inductor_configs={"post_grad_custom_post_pass": lambda graph: seen.append(str(graph))},
    )
    assert "out_dtype: torch.bfloat16" in seen[0]
    assert same_bits(torch._inductor.aoti_load_package(path)(*operands), Dense()(*operands))

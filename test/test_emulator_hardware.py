"""Recorded launches, repeated elsewhere: on an emulated device, and on a GPU of compute capability 9.0 if there is one.

On a machine without nvcc $DG_TEST_CASES names what `python -m ptx_emulator.hardware record` has written elsewhere.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator import hardware
from ptx_emulator.testing import kernels

torch = pytest.importorskip("torch")


class EmulatedDevice:
    """What `hardware.run_case` asks of a device, with the host's memory and the emulator."""

    def __init__(self):
        self.memory = {}

    def allocate(self, size):
        raw = np.zeros(size + 256, np.uint8)
        address = -(-raw.ctypes.data // 256) * 256
        self.memory[address] = raw
        return address

    def free(self, address):
        del self.memory[address]

    def write(self, address, data):
        hardware.ctypes.memmove(address, data, len(data))

    def read(self, address, size):
        return hardware.ctypes.string_at(address, size)

    def encode(self, dtype, address, dims, strides, box, element_strides, swizzle, oob_fill):
        return ptx_emulator.encode_tiled(
            dtype, len(dims), address, dims, strides, box, element_strides, swizzle=swizzle, oob_fill=oob_fill
        ).blob

    def load(self, image):
        return ptx_emulator.Module(image)

    def unload(self, module):
        pass

    def launch(self, module, entry, grid, block, cluster, shared_bytes, params):
        buffers = [(raw.ctypes.data, raw.nbytes) for raw in self.memory.values()]
        module.launch(entry, grid, block, params, cluster, shared_bytes, buffers)


@pytest.fixture
def recorder():
    with hardware.recording() as recorder:
        yield recorder


def saved(recorder, path):
    recorder.save(path / "cases.zip", machine_code=False)
    return hardware.Pack(path / "cases.zip")


def replace_map():
    base, mat = np.zeros((4, 64), np.int32), np.random.randint(1, 99, (7, 24), dtype=np.int32)
    slot = np.zeros(512, np.uint8)
    slot = slot[-slot.ctypes.data % 128 :][:128]
    out = np.zeros((8, 32), np.int32)
    kernels("tma").launch("replace_map", 1, 64, [ptx_emulator.tensor_map(base, "s32", [32, 8]), slot, mat, 24, 7, out])


def multicast(*seeds):
    """In the same memory: where it lies is a part of a case."""
    a, out = np.arange(1024, dtype=np.int32).reshape(32, 32), np.zeros((2, 32, 32), np.int32)
    for seed in seeds:
        out[:] = 0
        kernels("tma").launch("multicast", 2, 64, [ptx_emulator.tensor_map(a, "s32", [32, 16]), out], seed=seed)


def add(n=100):
    a, b, c = np.random.randn(3, n).astype(np.float32)
    kernels("basic").launch("vadd", 1, 128, [a.copy(), b.copy(), c.copy(), n])


def test_a_launch_is_repeated(recorder, tmp_path):
    """Pointers and tensor maps in parameters, a map that the kernel writes to memory, clusters."""
    replace_map()
    multicast(0)
    add()
    pack = saved(recorder, tmp_path)
    assert [case.entry for case in pack.cases] == ["replace_map", "multicast", "vadd"]
    for case in pack.cases:
        results, outside = hardware.run_case(EmulatedDevice(), pack, case)
        assert not outside
        changed = 0
        for region, data in zip(case.regions, results):
            assert hardware.compare(region, pack.blob(region.after.blob), data) == ""
            changed += region.before.blob != region.after.blob
        assert changed


def test_pointers_in_memory_are_moved(recorder, tmp_path):
    """The kernel finds its data through a pointer that lies in global memory."""
    from ptx_emulator.testing import module

    mod = module(
        ".reg .b64 %p, %o; .reg .b32 %r; ld.param.u64 %p, [out]; ld.global.u64 %o, [%p + 8];"
        "ld.global.u32 %r, [%o + 4]; add.u32 %r, %r, 1; st.global.u32 [%o + 4], %r;"
    )
    data = np.array([5, 6, 7], np.uint32)
    table = np.array([0, data.ctypes.data], np.uint64)
    mod.launch("k", 1, 1, [table], buffers=[data])
    pack = saved(recorder, tmp_path)
    (case,) = pack.cases
    results, _ = hardware.run_case(EmulatedDevice(), pack, case)
    assert sorted(len(data) for data in results) == [12, 16]
    by_size = {len(data): data for data in results}
    assert np.frombuffer(by_size[12], np.uint32).tolist() == [5, 7, 7]
    for region, data in zip(case.regions, results):
        assert hardware.compare(region, pack.blob(region.after.blob), data) == ""


def test_schedules_are_one_case_and_faults_are_none(recorder, tmp_path):
    multicast(0, 1, 2)
    with pytest.raises(ptx_emulator.PtxError):
        kernels("basic").launch("bug_smem_oob", 1, 32, [np.zeros(32, np.int32), 1])
    kernels("basic").launch("vadd", 1, 32, [*np.zeros((3, 32), np.float32)[:, None].copy(), 32], check_order=False)
    assert len(saved(recorder, tmp_path).cases) == 1


def test_a_difference_is_found(recorder, tmp_path):
    add()
    pack = saved(recorder, tmp_path)
    (case,) = pack.cases
    number, wrong = next((i, r) for i, r in enumerate(case.regions) if r.before.blob != r.after.blob)
    data = np.frombuffer(pack.blob(wrong.after.blob), np.float32).copy()
    data[7] = np.nextafter(data[7], np.float32(np.inf))
    actual, _ = hardware.run_case(EmulatedDevice(), pack, case)
    assert hardware.compare(wrong, data.tobytes(), actual[number]).startswith("1 of 100 values")


def test_writing_outside_is_found(recorder, tmp_path):
    class Careless(EmulatedDevice):
        def launch(self, *args):
            super().launch(*args)
            start, end = next((address, address + raw.nbytes - 256) for address, raw in self.memory.items())
            self.write(start + 256 + 5, b"x")
            self.write(end - hardware.GUARD_BYTES - 250, b"x")

    add()
    pack = saved(recorder, tmp_path)
    _, outside = hardware.run_case(Careless(), pack, pack.cases[0])
    ((_, text),) = outside.items()
    assert "wrote outside" in text and "bytes before its start" in text


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not hopper(), reason="needs a GPU of compute capability 9.0")
def test_conformance_on_the_gpu(tmp_path):
    """Each launch of the emulator's own tests gives the same bits on the GPU."""
    folder = Path(__file__).parent
    cases = Path(os.environ.get("DG_TEST_CASES", tmp_path / "cases.zip"))
    tool = [sys.executable, "-m", "ptx_emulator.hardware"]
    if not cases.exists():
        subprocess.run([*tool, "record", cases], cwd=folder, check=True)
    subprocess.run([*tool, "run", cases, "--out", tmp_path], cwd=folder, check=True)
    results = hardware.json.loads((tmp_path / "results.json").read_text())["results"]
    wrong = [f"{result['name']}: {result['detail']}" for result in results if result["status"] != "equal"]
    assert results and not wrong, "\n".join(wrong)

"""The SASS of kernels in the library, for gates that look at most of them.

`inspect.kernel_sass` reads the whole library for each kernel. Here the cubin of a kernel is disassembled, once, and
by nvdisasm alone, which leaves out the encodings that are three quarters of what cuobjdump prints.
"""

from __future__ import annotations

import collections
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deep_gemm_ops import _capi, inspect


@functools.cache
def _library() -> Path:
    return Path(_capi.library()._name)


@functools.cache
def _usage() -> str:
    return inspect._cuobjdump("--dump-resource-usage", _library())


@functools.cache
def _cubins(arch: str) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        command = [inspect.find_tool("cuobjdump"), "-arch", arch, "-xelf", "all", _library()]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return [path.read_bytes() for path in sorted(Path(folder).glob("*.cubin"))]


@functools.cache
def _listings(arch: str, cubin: int) -> dict[str, str]:
    """The SASS of each function of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(_cubins(arch)[cubin])
        file.flush()
        command = [inspect.find_tool("nvdisasm"), "--print-code", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


@functools.cache
def kernel_sass(kernel: str, arch: str) -> tuple[dict[str, Any], list[str], collections.Counter[str]]:
    """Resources, instructions, and how often each full mnemonic occurs, of the kernel with ``kernel`` in its name."""
    resources = inspect._parse_resources(_usage(), kernel)
    function = resources["function"]
    section = b"\0.text." + function.encode() + b"\0"
    (cubin,) = [i for i, data in enumerate(_cubins(arch)) if section in data]
    lines = inspect._parse_sass(_listings(arch, cubin)[function])
    return resources, lines, collections.Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in lines)


def all_kernels(arch: str) -> Iterator[tuple[str, list[str]]]:
    """Name and instructions of each function."""
    for cubin in range(len(_cubins(arch))):
        for function, listing in _listings(arch, cubin).items():
            yield function, inspect._parse_sass(listing)


def empty_descriptors(lines: list[str]) -> list[str]:
    """``wgmma`` instructions in front of which the upper word of a descriptor, which is never zero, is set to zero.

    ptxas 13.0 did that in a loop where descriptors were put together in 64 bits, though the PTX, which is all that the
    emulator sees, was right. Writes are followed in the order of addresses: they stand next to their use.
    """
    last: dict[int, str] = {}
    found = []
    for line in lines:
        instruction = re.sub(r"^@!?U?P\w+\s+", "", line)
        if match := re.match(r"[HQIB]GMMA\S*\s+\S+, (R\d+\S*, )?gdesc\[UR(\d+)\]", instruction):
            first = int(match[2])
            # A's descriptor, then B's; A may be in registers instead.
            words = [first + 3] if match[1] else [first + 1, first + 3]
            if any(re.match(r"UMOV UR\d+, (URZ|0x0)\b", last.get(word, "")) for word in words):
                found.append(line)
        elif match := re.match(r"\S+\s+UR(\d+)", instruction):
            register = int(match[1])
            last[register] = instruction
            if ".64" in instruction.split()[0]:
                last[register + 1] = instruction
    return found

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

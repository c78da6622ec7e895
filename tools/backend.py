"""The PEP 517 backend: setuptools, plus the CUDA compiler from PyPI where this machine has none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import toolchain
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def _extra_requirements() -> list[str]:
    if toolchain.skip_cuda_build():
        return []
    names = ["build", "torch"]
    try:
        toolchain.find_nvcc()
    except toolchain.ToolchainError:
        names.append("cuda")
    return [line for name in names for line in toolchain.requirements(name)]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_extra_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_extra_requirements()]

"""Makes the virtual environment that ``make demo`` and ``make test`` run in. Standard library only.

    python3 tools/make_env.py --venv .venv [test]

Installs the pinned requirements, and the CUDA compiler from PyPI only where this machine has no nvcc. A PyTorch of
2.11 or later that the calling interpreter already has (a CUDA build, usually) is used as it is: the environment is
pointed at it instead of downloading another. With ``--venv ''`` the calling interpreter itself is the environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import toolchain


def torch_site() -> Path | None:
    """The folder this interpreter imports PyTorch from, if that PyTorch is new enough and can build extensions."""
    try:
        return toolchain.find_torch().parent
    except toolchain.ToolchainError:
        return None


def create(folder: Path) -> Path:
    """Creates the environment if it is not there; returns its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"creating {folder}", flush=True)
        try:
            venv.EnvBuilder(with_pip=True, symlinks=True).create(folder)
        except (subprocess.CalledProcessError, ImportError) as error:
            sys.exit(
                f"{sys.executable} cannot create a virtual environment ({error}). Install Python's venv module, for "
                "example\n    apt-get install python3-venv"
            )
    code = "import site; print(site.getsitepackages()[0])"
    packages = Path(subprocess.check_output([str(python), "-c", code], text=True).strip())
    (packages / "deep_gemm_ops_checkout.pth").write_text(f"{toolchain.ROOT / 'python'}\n")
    inherited = torch_site()
    if inherited is not None and not inherited.is_relative_to(folder.resolve()):
        (packages / "deep_gemm_ops_torch.pth").write_text(f"{inherited}\n")
    return python


def installed(python: Path) -> dict[str, str]:
    """Name and version of every package the environment sees."""
    code = "from importlib import metadata as m\nfor d in m.distributions(): print(d.metadata['Name'], d.version)"
    lines = subprocess.check_output([str(python), "-c", code], text=True).splitlines()
    return {name.lower().replace("_", "-"): version for name, version in (line.split() for line in lines)}


def install(python: Path, groups: list[str]) -> None:
    """Installs the requirements of every group that the environment does not meet."""

    def pip(*args: str) -> None:
        command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *args]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
            sys.exit(f"pip could not install the requirements: {' '.join(command)}")

    have = installed(python)
    for group in groups:
        lines = toolchain.requirements(group)
        if group == "torch" and "torch" in have:
            lines = [line for line in lines if line.split("==")[0] not in have]
        if group == "cuda":
            # All of the toolkit has to lie in one folder, also where a CUDA PyTorch has brought a part of it.
            pip("--no-deps", "--ignore-installed", *lines)
        elif lines:
            pip(*lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", required=True, help="folder of the environment; '' for the calling interpreter")
    parser.add_argument("groups", nargs="*", choices=[[], "test"], help="requirements besides those of the build")
    args = parser.parse_args()

    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit(f"Python is {sys.version.split()[0]}, expected 3.10 or later: make PYTHON=python3.11 ...")
    groups = ["build", "torch", *args.groups]
    if not toolchain.skip_cuda_build() and not os.environ.get("CUDA_HOME") and not shutil.which("nvcc"):
        groups.append("cuda")

    python = create(Path(args.venv)) if args.venv else Path(sys.executable)
    wanted = "\n".join(line for group in groups for line in toolchain.requirements(group))
    stamp = Path(args.venv) / "deep_gemm_ops_requirements.txt" if args.venv else None
    if stamp is not None and stamp.is_file() and set(wanted.splitlines()) <= set(stamp.read_text().splitlines()):
        return
    install(python, groups)
    if stamp is not None:
        stamp.write_text(wanted)


if __name__ == "__main__":
    main()

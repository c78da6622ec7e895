"""The demonstration that ``make demo`` runs: a decoder block and a small language model, both on FP8 operators.

    python examples/demo.py            both parts, about two minutes on two CPU cores
    python examples/demo.py --quick    both in under a minute, at toy sizes

Exits with 1 if a check fails. Each part also runs alone: ``decoder_block.py`` and ``byte_lm.py`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence

# OpenMP threads that spin while they wait make small operations ten times slower wherever other work shares the cores.
# Read when PyTorch is loaded.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import byte_lm
import decoder_block
import torch


def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts and return the exit status."""
    parser = argparse.ArgumentParser(description="decoder block and byte-level language model on the FP8 operators")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", choices=("decoder", "lm"), help="run one of the two parts")
    parser.add_argument("--scale", type=int, help="divide the decoder block's sizes (default: 1 on a GPU, 4 on a CPU)")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time of the language model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="toy sizes; for tests")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args(argv)

    start = time.monotonic()
    print(f"PyTorch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} CPU threads\n")
    common = ["--device", args.device, "--seed", str(args.seed)] + ["--quick"] * args.quick
    results = {}
    if args.only != "lm":
        print("== 1. Decoder block ==")
        results["decoder"] = decoder_block.main(common + (["--scale", str(args.scale)] if args.scale else []))
        print()
    if args.only != "decoder":
        print("== 2. Byte-level language model ==")
        results["lm"] = byte_lm.main(common + ["--seconds", str(args.seconds)])
        print()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)
    failures = [failure for result in results.values() for failure in result["failures"]]
    verdict = f"{len(failures)} checks FAILED" if failures else "all checks passed"
    print(f"Demo finished in {time.monotonic() - start:.0f} s: {verdict}.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

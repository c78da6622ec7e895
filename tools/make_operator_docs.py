"""Writes docs/operators.md from the registry: schemas, docstrings, and examples that are run while the page is made.

python tools/make_operator_docs.py            # writes the page
python tools/make_operator_docs.py --check    # says whether it is current
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from operator_examples import EXAMPLES, SETUP

import deep_gemm_ops
from deep_gemm_ops import _library
from deep_gemm_ops.nn import _library as nn_library
from deep_gemm_ops.nn import functional

PAGE = Path(__file__).resolve().parent.parent / "docs" / "operators.md"

HEAD = """\
# Operators

Made by `tools/make_operator_docs.py` from the registry, the docstrings and calls that it runs: edit those.

Every operator is `torch.ops.deep_gemm.<name>`, and `deep_gemm_ops.<name>` is the same as a typed function, with an
`out=` keyword where there is an `.out` overload. All take CPU tensors (the reference), CUDA tensors where the library
has a kernel, and fake tensors. Errors are `RuntimeError`, raised before anything is launched. The examples share these
names:

```python
{setup}```
"""

#: Title and what the names of a family begin or end with, in the order of the page.
FAMILIES = (
    ("FP8 and FP4 products", r"fp8(_fp4)?_gemm_.*"),
    ("BF16 products", r"bf16_gemm_.*"),
    ("Products of groups", r"[mk]_grouped_.*gemm.*"),
    ("Batched products", r".*einsum"),
    ("Hyper-connections", r"tf32_.*"),
    ("Indexer scoring", r".*mqa_logits.*"),
    ("Mega MoE", r".*_mega_moe"),
    ("Casts", r".*_cast_to_.*|transpose_fp8"),
    ("Layouts of scales", r"get_.*|transform_.*|expand_.*"),
    ("Training", r"fp8_.*linear.*"),
    ("Others", r".*"),
)


def schemas_by_name() -> dict[str, list[str]]:
    """Every operator with the schemas of its overloads, the library's first."""
    result: dict[str, list[str]] = {}
    for schema in [*_library.schemas(), *nn_library.schemas]:
        result.setdefault(re.split(r"[.(]", schema)[0], []).append(schema)
    return result


def docstring(name: str) -> str:
    for owner in (deep_gemm_ops, functional):
        if hasattr(owner, name):
            return getattr(owner, name).__doc__
    return nn_library.implementations[name].__doc__


def markdown(doc: str) -> str:
    """A docstring as Markdown: sections become paragraphs, arguments a list."""
    first, _, rest = doc.strip().partition("\n")
    lines = [first, *(line[4:] if line.startswith("    ") else line for line in rest.splitlines())]
    out: list[str] = []
    for line in lines:
        line = re.sub(r":func:`~?([^`]+)`", r"`\1`", line).replace("``", "`")
        section = re.fullmatch(r"(Args|Returns|Raises):", line)
        argument = re.match(r"    (\w[\w, ]*?): (.*)", line)
        if section:
            out += [{"Args": "Arguments:", "Returns": "Returns:", "Raises": "Errors:"}[section[1]], ""]
        elif argument:
            names = ", ".join(f"`{name}`" for name in argument[1].split(", "))
            out.append(f"- {names}: {argument[2]}")
        elif line.startswith("    "):
            inside_list = bool(out) and (out[-1].startswith(("- ", "  ")))
            out.append(("  " if inside_list else "") + line.strip())
        else:
            out.append(line)
    return "\n".join(out).strip()


def describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)) and any(isinstance(item, torch.Tensor) for item in value):
        return ", ".join(map(describe, value))
    return repr(value)


def example(name: str, scope: dict[str, Any]) -> str:
    """A call with its result, and a refused one with its message, both as they come out."""
    call, refused = EXAMPLES[name]
    result = describe(eval(call, scope))
    try:
        eval(refused, scope)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
    else:
        raise SystemExit(f"{name}: the call that should be refused is not: {refused}")
    return f"```python\n{call}\n# {result}\n\n{refused}\n# RuntimeError: {message}\n```"


def page() -> str:
    scope: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(SETUP, scope)
    names = schemas_by_name()
    missing = sorted(set(names) - set(EXAMPLES))
    if missing:
        raise SystemExit(f"tools/operator_examples.py has no entry for {', '.join(missing)}")
    parts = [HEAD.format(setup=SETUP)]
    for title, pattern in FAMILIES:
        family = [name for name in names if re.fullmatch(pattern, name)]
        if family:
            parts.append(f"\n## {title}\n")
        for name in family:
            schemas = "\n".join(names.pop(name))
            sections = [f"### {name}", f"```text\n{schemas}\n```", markdown(docstring(name)), example(name, scope)]
            parts.append("\n" + "\n\n".join(sections) + "\n")
    return "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description="writes docs/operators.md from the registry")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is not current")
    args = parser.parse_args()
    text = page()
    current = PAGE.is_file() and PAGE.read_text() == text
    if args.check:
        print("docs/operators.md is current" if current else "docs/operators.md is stale: tools/make_operator_docs.py")
        return 0 if current else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

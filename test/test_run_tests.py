"""tools/run_tests.py: tests in several processes, each of them once, with one summary and one exit status."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import ROOT

FILES = {
    "test_a.py": """
import warnings
import pytest
@pytest.mark.parametrize("i", range(5))
def test_passes(i, count): pass
def test_skipped(count): pytest.skip("for a reason")
@pytest.mark.xfail
def test_expected(count): assert False
def test_warns(count): warnings.warn("beware")
""",
    "test_b.py": """
import pytest
@pytest.fixture
def broken(): raise RuntimeError("a fixture that fails")
def test_fails(count): print("printed by the test"); assert 1 == 2, "a test that fails"
def test_error(count, broken): pass
""",
    "test_c.py": "def test_one(count): pass\ndef test_two(count): pass\n",
    "conftest.py": """
import os, pathlib, pytest
@pytest.fixture
def count(request):
    with open(pathlib.Path(__file__).parent / "ran", "a") as file:
        file.write(f"{request.node.nodeid} {os.getpid()}\\n")
""",
    "pytest.ini": "[pytest]\naddopts = -rs\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def run(folder: Path, *arguments: str, processes: int = 2) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "tools" / "run_tests.py"), f"--processes={processes}", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    return result.returncode, result.stdout + result.stderr


def ran(folder: Path) -> list[tuple[str, str]]:
    """The tests that ran, and in which process."""
    return [tuple(line.split(" ")) for line in (folder / "ran").read_text().splitlines()]


def test_one_summary(folder: Path) -> None:
    status, text = run(folder)
    assert status == 1
    assert re.search(r"= 1 failed, 8 passed, 1 skipped, 1 xfailed, 1 warning, 1 error in [\d.]+s =", text), text
    for words in ("printed by the test", "a test that fails", "a fixture that fails", "for a reason", "beware"):
        assert words in text
    tests = [name for name, _ in ran(folder)]
    assert len(tests) == len(set(tests)) == 12
    # A file is not shared out.
    assert len({(name.split("::")[0], process) for name, process in ran(folder)}) == 3
    assert len({process for _, process in ran(folder)}) == 2


def test_arguments(folder: Path) -> None:
    status, text = run(folder, "-k", "one or passes", "--junitxml=out.xml")
    assert status == 0 and "= 6 passed, 6 deselected in" in text, text
    assert 'tests="6"' in (folder / "out.xml").read_text()
    status, text = run(folder, "test_c.py::test_two", processes=1)
    assert status == 0 and "= 1 passed in" in text, text
    assert len(ran(folder)) == 7


def test_nothing_to_run_is_no_success(folder: Path) -> None:
    assert run(folder, "-k", "nothing")[0] == pytest.ExitCode.NO_TESTS_COLLECTED
    status, text = run(folder, "test_missing.py")
    assert status != 0 and "test_missing.py" in text


def test_a_process_that_dies(folder: Path) -> None:
    """The test that it ran has failed, the others of its file were not run, and those of other files were."""
    (folder / "test_b.py").write_text("""
import os
def test_before(count): pass
def test_dies(count): os.abort()
def test_behind(count): pass
""")
    status, text = run(folder)
    assert status == 1
    assert re.search(r"_ test_dies _.*with -6; its last lines:.*Fatal Python error: Aborted", text, re.DOTALL), text
    assert "1 tests were not run:\ntest_b.py::test_behind" in text
    assert re.search(r"1 failed, 9 passed, 1 skipped, 1 xfailed", text), text


def test_broken_files(folder: Path) -> None:
    (folder / "test_c.py").write_text("import no_such_module\n")
    status, text = run(folder)
    assert status != 0 and "no_such_module" in text and "1 error" in text, text
    assert not (folder / "ran").exists()


def test_stops_at_the_first_failure(folder: Path) -> None:
    (folder / "test_c.py").write_text("import time\ndef test_long(): time.sleep(50)\n")
    status, text = run(folder, "-x", "test_b.py", "test_c.py")
    assert status == 1 and "stopping after 1 failures" in text, text

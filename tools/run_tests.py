"""pytest in several processes, with the output and the exit status of one. Needs nothing besides pytest.

    python tools/run_tests.py [--processes N] [pytest's arguments]

This process is a pytest that collects nothing. Each worker is a pytest of its own that collects everything and asks for
a file whenever it has run one, so that no file is run in two processes; it sends its reports here, where they are
reported as if the tests had run here. Every test that was collected has to be reported once, or the run has failed.
"""

from __future__ import annotations

import collections
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Begun with, so that no process is left alone with one at the end: the files that take longest, longest first.
LONGEST = [
    "test_gemm_emulated.py",
    "test_table.py",
    "test_mega_moe_emulated.py",
    "test_mega_moe_sm100_emulated.py",
    "test_mqa_logits_emulated.py",
    "test_gemm_sm100_emulated.py",
    "test_kernel_gates.py",
    "test_expert_parallel.py",
    "test_aoti.py",
    "test_compile.py",
    "test_host_ops.py",
]
LOG_LINES = 100  # of a worker that ended early; faulthandler may have written the stack of every thread


def file_of(nodeid: str) -> str:
    return nodeid.split("::")[0]


# -------------------------------------------------------------------------------------------------------------- worker


class Worker:
    """Runs the files that it is given, and sends what it sees: tuples of what it is and its contents."""

    def __init__(self, connection: multiprocessing.connection.Connection) -> None:
        self.connection = connection

    def send(self, kind: str, *contents: Any) -> None:
        self.connection.send((kind, *contents))

    def pytest_configure(self, config: pytest.Config) -> None:
        # With this plugins know that another process writes caches and files of results.
        config.workerinput = {}
        self.config = config

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, nodeid: str, when: str) -> None:
        self.send(
            "warning",
            str(warning_message.message),
            warning_message.category.__name__,
            warning_message.filename,
            warning_message.lineno,
            nodeid,
            when,
        )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.send("collected", self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.send("deselected", len(items))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.send("tests", [item.nodeid for item in session.items])
        if session.testsfailed and not session.config.option.continue_on_collection_errors:
            return True
        files: dict[str, list[pytest.Item]] = collections.defaultdict(list)
        for item in session.items:
            files[file_of(item.nodeid)].append(item)

        def granted() -> Iterator[pytest.Item]:
            while True:
                self.send("next")
                file = self.connection.recv()
                if file is None:
                    return
                yield from files[file]

        # One item ahead: what it shares with the one before is not torn down in between.
        items = granted()
        item = next(items, None)
        while item is not None:
            following = next(items, None)
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self.send("done", item.nodeid)
            if session.shouldfail or session.shouldstop:
                break
            item = following
        return True

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self.send("start", nodeid, location)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.send("report", self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def work(connection: multiprocessing.connection.Connection, arguments: list[str], log: Path) -> None:
    """The main function of a worker. What it prints says something only if it ends early."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    worker = Worker(connection)
    status = pytest.main(arguments, plugins=[Options(), worker])
    worker.send("end", int(status))


# ---------------------------------------------------------------------------------------------------------- controller


class Options:
    """What the command line has besides pytest's options."""

    def pytest_addoption(self, parser: pytest.Parser) -> None:
        group = parser.getgroup("processes")
        group.addoption(
            "--processes",
            type=int,
            default=1 if Path("/dev/nvidiactl").exists() else len(os.sched_getaffinity(0)),
            help="processes to run tests in; by default one for each core that may be used, or one where there is a "
            "GPU, whose memory and time they would share",
        )


class Process:
    """A worker as the controller sees it."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.log = log
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, arguments, log))
        self.process.start()
        theirs.close()
        self.tests: list[str] | None = None
        self.running: tuple[str, Any] | None = None  # the test, and where it is
        self.held: list[tuple[Any, ...]] = []  # messages about tests of a file that is not done
        self.waits = False  # for a file
        self.status: int | None = None  # of its pytest, if it came to its end
        self.gone = False

    def interrupt(self) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGINT)


class Controller:
    """Gives files to workers, and reports what they report."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.problems: list[str] = []  # that are no test's
        self.reported: collections.Counter[str] = collections.Counter()
        self.collect_reports: set[str] = set()
        self.warnings: set[tuple[Any, ...]] = set()

    def pytest_collection(self, session: pytest.Session) -> bool:
        """Workers do that."""
        return True

    def pytest_report_header(self, config: pytest.Config) -> str:
        return f"processes: {config.option.processes}"

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.session, self.config = session, session.config
        # Threads of workers that wait for one another cost more than they bring.
        threads = max(1, len(os.sched_getaffinity(0)) // self.config.option.processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        with tempfile.TemporaryDirectory(prefix="run_tests-") as folder:
            logs = [Path(folder) / f"{i}.log" for i in range(self.config.option.processes)]
            self.workers = [Process(self.arguments, log) for log in logs]
            try:
                self.serve()
            except KeyboardInterrupt:
                for worker in self.workers:
                    worker.interrupt()
                raise
            finally:
                for worker in self.workers:
                    worker.connection.close()
                    worker.process.join()
        if self.stopped:
            raise session.Failed(session.shouldfail or session.shouldstop)
        self.check()
        session.testsfailed += len(self.problems)
        return True

    @property
    def stopped(self) -> bool:
        """By -x or --maxfail."""
        return bool(self.session.shouldfail or self.session.shouldstop)

    def serve(self) -> None:
        """Until no worker has anything more to say."""
        self.queue: collections.deque[str] | None = None
        open_workers = {worker.connection: worker for worker in self.workers}
        while open_workers:
            for connection in multiprocessing.connection.wait(list(open_workers)):
                worker = open_workers[connection]
                try:
                    self.receive(worker, *connection.recv())
                except EOFError:
                    del open_workers[connection]
                    self.ended(worker)
            self.hand_out()

    def receive(self, worker: Process, kind: str, *contents: Any) -> None:
        if kind == "tests":
            (worker.tests,) = contents
        elif kind == "next":
            worker.waits = True
        elif kind == "end":
            (worker.status,) = contents
        elif kind == "collected":
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=contents[0])
            if report.nodeid not in self.collect_reports:
                self.collect_reports.add(report.nodeid)
                self.config.hook.pytest_collectreport(report=report)
        elif kind == "deselected":
            if worker is self.workers[0]:
                self.config.hook.pytest_deselected(items=[None] * contents[0])
        elif kind == "warning":
            self.warn(*contents)
        else:
            if kind == "start":
                if worker.held and file_of(worker.held[0][1]) != file_of(contents[0]):
                    self.report(worker)
                worker.running = contents
            elif kind == "done":
                worker.running = None
            worker.held.append((kind, *contents))

    def warn(self, text: str, category: str, file: str, line: int, nodeid: str, when: str) -> None:
        if when != "runtest":  # every worker says that
            if (text, file, line) in self.warnings:
                return
            self.warnings.add((text, file, line))
        message = warnings.WarningMessage(text, type(category, (Warning,), {}), file, line)
        self.config.hook.pytest_warning_recorded.call_historic(
            kwargs={"warning_message": message, "nodeid": nodeid, "when": when, "location": None}
        )

    def hand_out(self) -> None:
        """A file to each worker that waits, once all know what there is."""
        if self.queue is None:
            known = [worker.tests for worker in self.workers if not worker.gone or worker.tests is not None]
            if any(tests is None for tests in known):
                return
            if any(tests != known[0] for tests in known):
                self.problems.append("the processes have not collected the same tests")
                known = [[]]
            tests = known[0] if known else []
            self.session.testscollected = len(tests)
            rank = {name: i for i, name in enumerate(LONGEST)}
            files = dict.fromkeys(map(file_of, tests))
            self.queue = collections.deque(sorted(files, key=lambda f: rank.get(Path(f).name, len(rank))))
        for worker in self.workers:
            if worker.waits and not worker.gone:
                worker.waits = False
                worker.connection.send(self.queue.popleft() if self.queue and not self.stopped else None)

    def report(self, worker: Process) -> None:
        """Lets this process's plugins know what a worker has said about its tests."""
        hook = self.config.hook
        for kind, *contents in worker.held:
            if kind == "start":
                hook.pytest_runtest_logstart(nodeid=contents[0], location=contents[1])
                self.location = contents[1]
            elif kind == "report":
                report = hook.pytest_report_from_serializable(config=self.config, data=contents[0])
                hook.pytest_runtest_logreport(report=report)
            elif kind == "done":
                hook.pytest_runtest_logfinish(nodeid=contents[0], location=self.location)
                self.reported[contents[0]] += 1
        worker.held.clear()
        if self.stopped:
            for other in self.workers:
                if other is not worker:
                    other.interrupt()

    def ended(self, worker: Process) -> None:
        """A worker is gone; with a test that it had not done, that one has failed."""
        worker.process.join()
        worker.gone = True
        self.report(worker)
        if worker.status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            return
        if self.stopped:
            return
        status = worker.process.exitcode if worker.status is None else f"pytest's status {worker.status}"
        lines = worker.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        text = "\n".join([f"a process of the tests ended early, with {status}; its last lines:", *lines])
        if worker.running is None:
            self.problems.append(text)
            return
        nodeid, location = worker.running
        report = pytest.TestReport(nodeid, location, {}, "failed", text, "call")
        self.config.hook.pytest_runtest_logreport(report=report)
        self.config.hook.pytest_runtest_logfinish(nodeid=nodeid, location=location)
        self.reported[nodeid] += 1

    def check(self) -> None:
        """Each test once."""
        known = [worker.tests for worker in self.workers if worker.tests is not None]
        tests = collections.Counter(known[0] if known else [])
        if self.session.testsfailed and not self.reported:
            return  # collection failed
        for what, wrong in (("not run", tests - self.reported), ("run more than once", self.reported - tests)):
            if wrong:
                names = sorted(wrong)
                self.problems.append("\n".join([f"{len(names)} tests were {what}:", *names[:10]]))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        terminalreporter.line(f"processor time of all processes: {used.ru_utime + used.ru_stime:.0f} s")
        for problem in self.problems:
            terminalreporter.section("PROBLEM", red=True)
            terminalreporter.line(problem)


class Chooser:
    """Puts a controller in place, unless there is one process or something to look at."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def pytest_configure(self, config: pytest.Config) -> None:
        option = config.option
        if option.processes < 1:
            raise pytest.UsageError(f"--processes is {option.processes}, expected at least 1")
        alone = option.collectonly or option.usepdb or option.capture == "no" or option.processes == 1
        if not alone:
            config.pluginmanager.register(Controller(self.arguments), "controller")


def main(arguments: list[str]) -> int:
    return pytest.main(arguments, plugins=[Options(), Chooser(arguments)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A pytest plug-in for continuous integration: a skipped test is a failed run, unless it needs a GPU."""

from __future__ import annotations

import pytest

skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "GPU" not in str(report.longrepr):
        skipped.append(f"{report.nodeid}: {report.longrepr[-1] if isinstance(report.longrepr, tuple) else ''}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if skipped and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in skipped:
        terminalreporter.write_line(f"skipped where nothing may be skipped: {line}", red=True)

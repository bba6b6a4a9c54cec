"""A table of what was compared, at the end of the run."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each case in a line: which tensors were merged, and what the three engines made of them."""
    passed = terminalreporter.stats.get("passed", [])
    lines = [f"{case:<36} {outcome}" for report in passed for case, outcome in report.user_properties]
    if lines:
        terminalreporter.section("streaming, peft and unsloth")
        for line in sorted(lines):
            terminalreporter.write_line(line)

"""Requests made from the OpenAPI document, by schemathesis: no fault of ours, and no answer that contradicts it."""

from pathlib import Path

from rich.console import Console

from tests.chaos.rows import Row, none_of
from tests.dispatcher.conformance import Conformance, run

EXAMPLES = 200
SECONDS = 75


def measure(root: Path, console: Console) -> Conformance:
    """Let schemathesis ask for at most `SECONDS`."""
    outcome = run(root, examples=EXAMPLES, seconds=SECONDS)
    if outcome.contradictions or outcome.errors:
        console.print(outcome.report, markup=False)
    return outcome


def rows(outcome: Conformance) -> list[Row]:
    """Requests by status; faults, contradictions and what could not be tested."""
    kinds = ", ".join(f"{number} of {status}" for status, number in sorted(outcome.statuses.items()))
    return [
        Row("requests, and answers by status", f"{outcome.requests}: {kinds}", "over 500", outcome.requests > 500),
        Row("answers of 500 and above", str(outcome.faults), "0", outcome.faults == 0),
        none_of("answers that contradict the document", outcome.contradictions),
        none_of("operations that could not be tested", outcome.errors),
    ]

"""How doctor asks: all groups at once, told in order, with an end whatever hangs, and nothing left behind unsaid."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence

from dispatcher.doctor_findings import (
    AWAY,
    DENIED,
    FINE,
    MISSING,
    NO_CREDENTIALS,
    Check,
    Finding,
    Group,
    Outcome,
    Verdict,
    verdict_of,
)
from dispatcher.errors import ExportError

RUN_SECONDS = 60.0
"""Asking takes no longer, whatever hangs. Each probe has a shorter limit of its own."""
END_SECONDS = 5.0
"""Nor does clearing up, after that."""
_ENDING = (AWAY, MISSING, NO_CREDENTIALS)
"""After one of these the rest of a group would say the same again, and take its time."""
_CLEARING = Check("left_behind", "remove all that was made to ask", lambda: FINE)


class Examination:
    """Checks that are being asked, each group in a thread of its own.

    Args:
        groups: The checks.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._stopped = threading.Event()
        self._asked = [(group, _Asking(group, self._stopped)) for group in groups]
        for _, asking in self._asked:
            asking.start()

    def findings(self, limit: float = RUN_SECONDS) -> Iterator[Finding]:
        """What each check found, in their order.

        Args:
            limit: Seconds after which what has not answered is said not to.
        """
        deadline = time.monotonic() + limit
        for group, asking in self._asked:
            late = False
            for check in group.checks:
                try:
                    if late:
                        raise queue.Empty
                    yield Finding(check, asking.verdicts.get(timeout=max(0.0, deadline - time.monotonic())))
                except queue.Empty:
                    yield Finding(check, _skipped("an earlier one did not end") if late else _late(limit))
                    late = True

    def end(self, limit: float = END_SECONDS) -> list[Finding]:
        """Ask no more, let every group clear up, and say what may be left all the same; also after an interruption.

        Args:
            limit: Seconds for which it is waited.
        """
        self._stopped.set()
        deadline = time.monotonic() + limit
        for _, asking in self._asked:
            asking.join(max(0.0, deadline - time.monotonic()))
        left = [name for group, _ in self._asked for name in group.left()]
        if not left:
            return []
        message = f"there may be still: {', '.join(left)}"
        return [
            Finding(_CLEARING, Verdict(Outcome.UNKNOWN, "left_behind", message, f"gcloud storage rm {' '.join(left)}"))
        ]


class _Asking(threading.Thread):
    """Asks a group's checks, one after the other, and clears up."""

    def __init__(self, group: Group, stopped: threading.Event) -> None:
        # A daemon: what hangs for good must not keep the command from its end.
        super().__init__(name="doctor", daemon=True)
        self.verdicts: queue.Queue[Verdict] = queue.Queue()
        self._group = group
        self._stopped = stopped

    def run(self) -> None:
        unheld, ended = set[str](), ""
        try:
            for check in self._group.checks:
                if self._stopped.is_set():
                    break
                lacking = next((name for name in check.requires if name in unheld), ended)
                verdict = _skipped(f"{lacking} failed") if lacking and not check.even_so() else _verdict(check)
                if verdict.code == DENIED and check.after and unheld.issuperset(check.after):
                    verdict = _hidden(check.after)
                if verdict.outcome is not Outcome.OK:
                    unheld.add(check.name)
                if verdict.code in _ENDING:
                    ended = ended or check.name
                self.verdicts.put(verdict)
        finally:
            self._group.close()


def _verdict(check: Check) -> Verdict:
    try:
        return check.probe()
    except ExportError as error:
        return verdict_of(error)
    except BaseException as error:  # noqa: BLE001  # a thread's own end: a panic of a Rust library is no Exception
        return Verdict(Outcome.WRONG, "check_failed", f"a fault of doctor's own: {type(error).__name__}: {error}")


def _skipped(why: str) -> Verdict:
    return Verdict(Outcome.UNKNOWN, "not_asked", f"not asked, since {why}")


def _hidden(names: Sequence[str]) -> Verdict:
    return Verdict(Outcome.UNKNOWN, "needs_another", f"asking needs what is missing for {', '.join(names)}")


def _late(limit: float) -> Verdict:
    return Verdict(Outcome.MISSING, "timed_out", f"no answer within {limit:.0f} s")

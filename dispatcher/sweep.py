"""One sweep: put right what died, then collect what nobody needs any more."""

from collections.abc import Callable

from dispatcher.collector import Collector
from dispatcher.errors import ExportError, SweepIncomplete
from dispatcher.trigger import Trigger


def swept(trigger: Trigger, collector: Collector, *, lost_messages: bool = False) -> dict[str, int]:
    """Tend every unfinished export, then collect; what fails of one does not keep the other from being done.

    Two at a time are no harm.

    Args:
        trigger: Tends the exports.
        collector: Collects.
        lost_messages: The queue forgot all it held, as the in-process one does when its process ends.

    Returns:
        How often what was done: `requeued`, `failed`, `published`, `collected`.

    Raises:
        SweepIncomplete: Not everything got through; the next sweep tries that again.
    """
    steps: list[Callable[[], dict[str, int]]] = [
        lambda: trigger.sweep(lost_messages=lost_messages),
        collector.collect,
    ]
    done: dict[str, int] = {}
    missed: list[str] = []
    for step in steps:
        try:
            done |= step()
        except SweepIncomplete as error:
            done |= error.done
            missed += error.missed
        except ExportError as error:
            missed.append(error.message)
    if missed:
        raise SweepIncomplete(missed, done)
    return done

"""`python -m tests.fuzz.one TARGET CORPUS [libFuzzer's options]`: one target in a process of its own.

Ends with libFuzzer's status; the bytes that crash it, or hang, are where `-artifact_prefix` says.
"""

import hashlib
import logging
import os
import random
import sys
import traceback
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["exporter", "dispatcher"]):
    from tests.fuzz.mutations import damaged
    from tests.fuzz.targets import Run, refused, targets

CRASHED = 77
"""As libFuzzer ends a process"""


def _watched(run: Run, prefix: str) -> Run:
    """The same; what it raises ends the process at once, with the bytes in a file.

    atheris itself may be stopped by libFuzzer's alarm before it has written that.
    """

    def watched(content: bytes) -> None:
        try:
            run(content)
        except BaseException:  # noqa: BLE001  # whatever it is, it is what is looked for
            traceback.print_exc()
            sys.stderr.flush()
            Path(f"{prefix}crash-{hashlib.sha256(content).hexdigest()[:16]}").write_bytes(content)
            os._exit(CRASHED)

    return watched


def _mutated(content: bytes, limit: int, seed: int) -> bytes:
    """Half of the inputs are damaged as bytes, by libFuzzer, and half as JSON."""
    if seed % 2:
        mutated: bytes = atheris.Mutate(content, limit)
        return mutated
    return damaged(content, random.Random(seed))[:limit]


def main(name: str, corpus: Path, options: list[str]) -> None:
    logging.disable()
    with targets() as found:
        for number, seed in enumerate(found[name].seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        # libFuzzer ends the process by itself, and so leaves the base behind: tests.fuzz gives it a place to vanish in.
        prefix = next(option.partition("=")[2] for option in options if option.startswith("-artifact_prefix="))
        watched = _watched(refused(found[name].run), prefix)
        atheris.Setup([sys.argv[0], str(corpus), *options], watched, custom_mutator=_mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

"""`python -m tests.fuzz.one TARGET CORPUS [libFuzzer's options]`: one target in a process of its own.

Ends with libFuzzer's status; the bytes that crash it, or hang, are where `-artifact_prefix` says.
"""

import logging
import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["exporter", "dispatcher"]):
    from tests.fuzz.mutations import damaged
    from tests.fuzz.targets import refused, targets


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
        atheris.Setup([sys.argv[0], str(corpus), *options], refused(found[name].run), custom_mutator=_mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

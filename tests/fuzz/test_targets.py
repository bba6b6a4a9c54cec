"""The targets of `make fuzz`, by hypothesis, for some seconds: nothing but an `ExportError` comes of any bytes."""

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dispatcher.errors import ExportError
from tests.fuzz.__main__ import NAMES
from tests.fuzz.mutations import VALUES, damaged
from tests.fuzz.targets import MAX_BYTES, Target, refused, targets


@pytest.fixture(scope="module")
def all_targets() -> Iterator[dict[str, Target]]:
    with targets() as found:
        yield found


def test_the_names_are_the_targets(all_targets: dict[str, Target]) -> None:
    """`make fuzz` leaves none out."""
    assert tuple(all_targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_reaches_the_end_of_its_parser(name: str, all_targets: dict[str, Target]) -> None:
    """The first is what a trainer writes, so that what is near it is tried, and not only what is refused at once."""
    target = all_targets[name]
    target.run(target.seeds[0])
    assert all(len(seed) <= MAX_BYTES for seed in target.seeds)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
@example(seed=0)
def test_no_damage_to_a_seed_makes_a_parser_fail_otherwise(
    name: str, seed: int, all_targets: dict[str, Target]
) -> None:
    """As JSON, and as bytes."""
    target, chance = all_targets[name], random.Random(seed)
    content = damaged(chance.choice(target.seeds), chance)
    if chance.random() < 0.2:
        at = chance.randrange(len(content) + 1)
        content = content[:at] + chance.randbytes(2) + content[at + chance.randint(0, 9) :]
    refused(target.run)(content[:MAX_BYTES])


@pytest.mark.parametrize("name", NAMES)
def test_each_value_of_a_seed_may_be_any_other(name: str, all_targets: dict[str, Target]) -> None:
    """One at a time: what follows a colon, up to the next comma or bracket."""
    run = refused(all_targets[name].run)
    chance = random.Random(0)
    for seed in all_targets[name].seeds:
        colons = [at for at, byte in enumerate(seed) if byte == ord(":")]
        for at in chance.sample(colons, min(12, len(colons))):
            end = next((i for i in range(at, len(seed)) if seed[i] in b",}"), len(seed))
            for part in VALUES:
                run(seed[: at + 1] + part + seed[end:])


def test_what_is_no_refusal_is_a_crash() -> None:
    """Or the runs above could not fail."""

    def wrong(content: bytes) -> None:
        raise ExportError("refused") if content else KeyError

    refused(wrong)(b"a")
    with pytest.raises(KeyError):
        refused(wrong)(b"")

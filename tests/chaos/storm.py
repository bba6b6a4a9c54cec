"""One seed of failing ports: a user asks for a merged model and a GGUF, and goes on asking until both are there."""

import logging
import random
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from dispatcher import bootstrap
from dispatcher.errors import ExportError
from dispatcher.sweep import swept
from tests.chaos.deployment import ENDS_SECONDS, Deployment
from tests.chaos.faults import Dice, Fate
from tests.chaos.user import EXPORTS, Seen, User, client_of, exceptions_noted

BASES = ("base", "base-12b")
"""The second is called what takes two tasks"""
STORMY_ROUNDS = 25
"""After that nothing fails any more"""
CALM_ROUNDS = 25
"""In which all has to come to its end then"""
LONG = timedelta(hours=1)
"""Longer than any lease, and than a message may be under way"""
VERY_LONG = timedelta(days=8)
"""Longer than what is left of an export is kept, and all rounds together are not as long"""


@dataclass(frozen=True)
class Weather:
    """How bad it gets."""

    rate: float
    """How many of all calls fail, from 0 to 1"""
    lease_seconds: int
    lapses: float
    """How often, from 0 to 1, time passes while somebody is at work"""
    base: str
    """One of `BASES`"""


def calm(base: str = BASES[0]) -> Weather:
    """The weather in which nothing fails."""
    return Weather(0.0, 30, 0.0, base)


def weather(seed: int) -> Weather:
    """The weather of a seed: from 1 in 200 calls that fails to 1 in 7."""
    dice = random.Random(seed)
    return Weather(0.005 * 30 ** dice.random(), dice.choice((2, 30)), dice.choice((0.0, 0.0, 0.3)), dice.choice(BASES))


def storm(seed: int, root: Path, models: Path, weather: Weather) -> tuple[Seen, Deployment]:
    """Run one seed to its end; what was seen on the way, and the deployment as it is left, closed.

    Args:
        seed: Decides what fails, and when time passes.
        root: A directory with no stores in it.
        models: Where the bases and `adapter` lie.
        weather: How bad it gets.
    """
    seen = Seen(seed, weather.rate)
    began = time.monotonic()
    dice = Dice(seed, weather.rate)
    deployment = Deployment(root, models, dice, lease_seconds=weather.lease_seconds, base=weather.base)
    bootstrap.install(deployment.stack)
    try:
        with exceptions_noted(seen), client_of() as client:
            _driven(deployment, User(client, seen), seen, random.Random(f"time {seed}"), weather.lapses)
    finally:
        bootstrap.install(None)
        deployment.close()
    seen.seconds = time.monotonic() - began
    seen.faults = sum(count for fate, count in dice.thrown.items() if fate is not Fate.FINE)
    seen.executions, seen.attempts = len(deployment.runner.asked), len(deployment.runner.ended)
    seen.doubled += deployment.watch.doubled
    seen.inconsistent += deployment.watch.inconsistent
    seen.unexpected += deployment.runner.faults
    return seen, deployment


def _driven(deployment: Deployment, user: User, seen: Seen, dice: random.Random, lapses: float) -> None:
    done: set[str] = set()
    for number in range(STORMY_ROUNDS + CALM_ROUNDS):
        deployment.dice.calm = number >= STORMY_ROUNDS
        for kind in EXPORTS.keys() - done:
            found = user.look(kind) if kind in user.accepted else None
            if kind not in user.accepted or (found and found["state"] == "failed"):
                if found and not found["error"]["retryable"]:
                    seen.lost.append(f"{kind} failed for good: {found['error']}")
                user.ask(kind)
            elif found and found["state"] == "completed":
                done.add(kind)
        if done == EXPORTS.keys():
            break
        if dice.random() < lapses:
            time.sleep(dice.uniform(0.0, 0.5))
            deployment.pass_time(LONG)  # for those who are at work, too
            sweep(deployment)
        if not deployment.settled():
            seen.lost.append(f"after {ENDS_SECONDS:g} s something is still at work")
            return
        deployment.pass_time(LONG)
        sweep(deployment)
    else:
        seen.lost += [f"{kind} is not completed" for kind in EXPORTS.keys() - done]
    deployment.settled()
    deployment.dice.calm = True
    for kind in EXPORTS:
        if (state := user.ask(kind)) != "completed":
            seen.lost.append(f"{kind} was completed, and is {state} when it is asked for again")
    deployment.pass_time(VERY_LONG)
    sweep(deployment)
    deployment.settled()


def sweep(deployment: Deployment) -> None:
    """One sweep, whether or not it gets through."""
    try:
        swept(deployment.stack.trigger, deployment.stack.collector)
    except ExportError as error:
        logging.getLogger(__name__).info("the sweep did not get through: %s", error)

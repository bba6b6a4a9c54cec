"""A message as it comes off the queue's wire, and what is logged when it has to come again."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pydantic

from dispatcher.contract import JobMessage
from dispatcher.errors import ExportError

logger = logging.getLogger(__name__)
LAUNCHING = "launch_in_progress"
"""The code under which a message is refused while its export is being launched."""


def read_message(body: bytes, message_id: str | None) -> JobMessage | None:
    """The message in a body; None, which is logged, where it is none: to be acknowledged.

    Args:
        body: JSON, if all is well.
        message_id: What the queue calls it, for the log.
    """
    try:
        return JobMessage.model_validate_json(body)
    except (pydantic.ValidationError, RecursionError):
        # No delivery will ever read better; refusing it would only bring it back until it is dead.
        logger.error("a message that is no JobMessage was dropped", extra={"message_id": message_id})
        return None


@contextmanager
def refusals_logged() -> Iterator[None]:
    """One line for an error that asks for another delivery; while a launch is under way that is nothing unusual."""
    try:
        yield
    except ExportError as error:
        level = logging.INFO if error.error_code == LAUNCHING else logging.WARNING
        logger.log(level, "not acknowledged: %s", error.message, extra={"code": error.error_code})
        raise

"""What the stand-in for Cloud Storage refuses to compose, as the real service does and fake-gcs-server does not.

- https://cloud.google.com/storage/docs/json_api/v1/objects/compose
- https://cloud.google.com/storage/docs/composite-objects
"""

import json
from collections.abc import Callable
from http import HTTPStatus

from infra.local.uploads import Answer, refusal

MAX_SOURCES = 32


def compose_fault(body: bytes, generation_of: Callable[[str], str]) -> Answer | None:
    """The refusal of a compose request for its sources; None where they can be put together.

    Args:
        body: The request's.
        generation_of: The live generation of an object of the bucket; "0" where there is none.
    """
    sources = json.loads(body).get("sourceObjects") or []
    if not sources:
        return refusal(HTTPStatus.BAD_REQUEST, "You must provide at least one source component.")
    if len(sources) > MAX_SOURCES:
        message = f"The number of source components provided ({len(sources)}) exceeds the maximum ({MAX_SOURCES})"
        return refusal(HTTPStatus.BAD_REQUEST, message)
    for source in sources:
        live = generation_of(source["name"])
        if live == "0" or str(source.get("generation") or live) != live:
            return refusal(HTTPStatus.NOT_FOUND, f"Object {source['name']} was not found.")
        wanted = source.get("objectPreconditions", {}).get("ifGenerationMatch")
        if wanted is not None and str(wanted) != live:
            return refusal(
                HTTPStatus.PRECONDITION_FAILED, "At least one of the pre-conditions you specified did not hold."
            )
    return None

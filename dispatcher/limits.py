"""How much of anything a request, an answer and a record may hold."""

MAX_BODY_BYTES = 64 << 10
"""Of a request. One with the longest id and token takes under 1 KiB."""
PAGE = 100
"""Exports in one answer."""
MAX_LISTED_FILES = 10_000
"""Files in one listing. The largest artifact has some hundreds; a bucket's root may have any number."""
MAX_PATH_LENGTH = 4_096
"""Characters of a URI or path in a training job: a path's on Linux; an object's name in a bucket has at most 1,024."""
MAX_NAME_LENGTH = 1_024
"""Characters of any other field of a training job: a model's id, a revision, a status."""
MAX_MESSAGE_LENGTH = 4_000
"""Characters of an error's text in a record."""
MAX_SUMMARY_BYTES = 64 << 10
"""Of a record's summary as JSON. A Firestore document has at most 1 MiB, all of it read with every heartbeat."""
RETRY_AFTER_SECONDS = {429: 60, 503: 5}
"""What an answer tells a caller to wait: until an export may have ended; until a service may answer again."""

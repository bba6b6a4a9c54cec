"""Buckets of the local Cloud Storage, made behind the back of what is tested."""

import secrets

from google.cloud.storage import Bucket, Client


def new_bucket() -> str:
    """The name of a bucket that was made for one test."""
    name = f"bucket-{secrets.token_hex(6)}"
    with Client(project="test") as client:
        client.create_bucket(name)
    return name


def bucket_named(name: str) -> Bucket:
    """A bucket as someone else's client sees it."""
    return Client(project="test").bucket(name)

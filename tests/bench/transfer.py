"""What the libraries of hub and bucket do by themselves, each in a process of its own, to compare with.

python -m tests.bench.transfer download MODEL_ID     # into HF_HOME
python -m tests.bench.transfer upload BUCKET PREFIX DIRECTORY
python -m tests.bench.transfer seed MODEL_ID ADAPTER BUCKET PREFIX DIRECTORY     # download, PEFT merge, save, upload
"""

import sys
from pathlib import Path


def download(model_id: str) -> str:
    """A whole snapshot; returns where it is."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(model_id))


def upload(bucket: str, prefix: str, directory: str) -> None:
    """Every file of a directory, with the client's own defaults."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    there = Client("local", AnonymousCredentials()).bucket(bucket)
    for path in sorted(Path(directory).iterdir()):
        there.blob(f"{prefix}/{path.name}").upload_from_filename(path)


def seed(model_id: str, adapter: str, bucket: str, prefix: str, directory: str) -> None:
    """An export without this project: one step after the other, over the disk and the memory."""
    from tests.bench import peft_merge

    peft_merge.main(download(model_id), adapter, directory)
    upload(bucket, prefix, directory)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["download", model_id]:
            download(model_id)
        case ["upload", *arguments]:
            upload(*arguments)
        case ["seed", *arguments]:
            seed(*arguments)
        case other:
            sys.exit(f"{other}: expected one of the commands above")

"""Stub."""

from dataclasses import dataclass

from exporter.byte_source import ByteReader


@dataclass(frozen=True)
class HubFile:
    name: str
    size: int
    etag: str

    def open(self, *, whole: bool = False) -> ByteReader:
        raise NotImplementedError

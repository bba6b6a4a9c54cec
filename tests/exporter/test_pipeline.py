"""Reading, making and writing side by side."""

import threading
from collections.abc import Callable
from functools import partial

import pytest

from exporter.pipeline import BUFFERS_AHEAD, Pipeline


def test_what_is_read_first_is_written_first() -> None:
    """However long each takes to make, and in as many buffers as there are."""
    workers = 3
    written: list[int] = []
    buffers: set[int] = set()
    rooms: list[object] = []
    last_first = [threading.Event() for _ in range(60)]

    def make_room() -> object:
        rooms.append(object())
        return rooms[-1]

    with Pipeline(8, make_room, workers=workers) as pipeline:
        for number in range(60):

            def read(buffer: bytearray, number: int = number) -> None:
                buffers.add(id(buffer))
                buffer[:1] = bytes([number])

            def fill(buffer: bytearray, room: object, number: int = number) -> int:
                if number % 2 == 0:
                    assert last_first[number + 1].wait(10)  # the one after it is made first
                last_first[number].set()
                return buffer[0]

            def hand_on(buffer: bytearray, told: int, number: int = number) -> None:
                assert told == number == buffer[0]
                written.append(number)

            pipeline.put(read, fill, hand_on)
        pipeline.drain()
    assert written == [*range(60)]
    assert len(buffers) <= workers + BUFFERS_AHEAD
    assert len(rooms) <= workers


@pytest.mark.parametrize("step", ["read", "fill", "hand_on"])
def test_a_fault_of_any_step_ends_the_work(step: str) -> None:
    """It reaches whoever puts, and nothing that comes after it is written."""
    written: list[int] = []

    def failing(name: str, number: int) -> None:
        if name == step and number == 5:
            raise ValueError(f"{name} of {number}")

    with pytest.raises(ValueError, match=f"{step} of 5"):
        _put_all(failing, written)
    assert written == [0, 1, 2, 3, 4] or (step == "read" and written == [*range(len(written))])
    assert len(written) <= 5


def _put_all(failing: Callable[[str, int], None], written: list[int]) -> None:
    with Pipeline(8, object, workers=2) as pipeline:
        for number in range(100):
            pipeline.put(*_steps(failing, number, written))
        pipeline.drain()


def _steps(
    failing: Callable[[str, int], None], number: int, written: list[int]
) -> tuple[Callable[[bytearray], None], Callable[[bytearray, object], None], Callable[[bytearray, None], None]]:
    def hand_on(buffer: bytearray, told: None) -> None:
        failing("hand_on", number)
        written.append(number)

    return lambda buffer: failing("read", number), lambda buffer, room: failing("fill", number), hand_on


def test_reading_goes_ahead_of_writing() -> None:
    """As far as there are buffers, and no further: memory is bounded."""
    may_write = threading.Event()
    read: list[int] = []

    def hand_on(buffer: bytearray, told: None) -> None:
        assert may_write.wait(10)

    ahead = 2 + BUFFERS_AHEAD
    with Pipeline(8, object, workers=2) as pipeline:
        for number in range(ahead):
            pipeline.put(partial(_note, read, number), _make, hand_on)
        assert read == [*range(ahead)]
        beyond = threading.Thread(target=pipeline.put, args=(partial(_note, read, ahead), _make, hand_on))
        beyond.start()
        beyond.join(0.2)
        assert beyond.is_alive()
        may_write.set()
        beyond.join(10)
        pipeline.drain()
    assert read == [*range(ahead + 1)]


def _note(read: list[int], number: int, buffer: bytearray) -> None:
    read.append(number)


def _make(buffer: bytearray, room: object) -> None:
    """Makes nothing."""

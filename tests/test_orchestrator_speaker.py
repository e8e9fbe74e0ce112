"""The queue to a server: nobody waits, nothing is told out of order, an outage is told once."""

import threading

import pytest

from orchestrator.tracking.speaker import Speaker


def speaker(warned: list[BaseException]) -> Speaker:
    return Speaker(lambda error: isinstance(error, OSError), warned.append)


def test_who_tells_does_not_wait_and_calls_keep_their_order():
    told: list[int] = []
    answered = threading.Event()
    voice = speaker([])
    voice.tell(lambda: (answered.wait(), told.append(0))[1])
    for number in range(1, 20):
        voice.tell(lambda number=number: told.append(number))
    assert told == []  # had `tell` waited for an answer, it would not have returned
    answered.set()
    voice.flush()
    assert told == list(range(20))
    assert voice.complete


def test_after_an_outage_the_next_calls_are_left_out_and_it_is_said_once():
    told: list[str] = []
    warned: list[BaseException] = []
    voice = speaker(warned)

    def fail() -> None:
        raise ConnectionError("gone")

    voice.tell(lambda: told.append("before"))
    voice.tell(fail)
    voice.tell(fail)
    voice.tell(lambda: told.append("after"))
    voice.flush()
    assert told == ["before"]
    assert [str(error) for error in warned] == ["gone"]
    assert not voice.complete


def test_a_fault_that_is_no_outage_is_raised_at_the_next_flush():
    voice = speaker([])
    voice.tell(lambda: {}["absent"])
    with pytest.raises(KeyError, match="absent"):
        voice.flush()
    voice.flush()

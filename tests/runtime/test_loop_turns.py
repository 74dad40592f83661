"""A thread that works while the loop stands still for it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from aspenfs.kv.types import put
from aspenfs.runtime import loop_turns
from aspenfs.runtime.loop_turns import LoopTurns
from aspenfs.runtime.statedb import StateDb
from tests.runtime.host_driver import open_store, running, until


class Steps:
    """A loop that counts its steps, and a thread beside it."""

    def __init__(self) -> None:
        self.count = 0

    async def run(self, work: Callable[[LoopTurns], object]) -> None:
        turns = LoopTurns(trio.lowlevel.current_trio_token())
        ended = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def thread() -> None:
            try:
                work(turns)
            finally:
                token.run_sync_soon(ended.set)

        with trio.fail_after(20):
            started = threading.Thread(target=thread)
            started.start()
            while not ended.is_set():
                self.count += 1
                await trio.lowlevel.checkpoint()
            started.join()

    def until_more_than(self, count: int) -> None:
        """In the thread. Ends with the thread if the loop hangs."""
        deadline = time.monotonic() + 10
        while self.count <= count:
            assert time.monotonic() < deadline, "the loop hangs"
            time.sleep(0.001)


def everybody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine that is so busy that a thread does not run for a while."""
    monkeypatch.setattr(loop_turns, "_PATIENCE_S", 10.0)
    monkeypatch.setattr(loop_turns, "_TURN_S_MAX", 10.0)


def test_the_loop_stands_still_for_a_turn_and_goes_on_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    everybody_waits(monkeypatch)
    steps = Steps()
    within: list[int] = []

    def work(turns: LoopTurns) -> None:
        for _ in range(50):
            turns.begin()
            began = steps.count
            time.sleep(0.002)
            within.append(steps.count - began)
            turns.end()
            steps.until_more_than(began)

    trio.run(steps.run, work)
    assert within == [0] * 50


def test_beginning_again_lets_the_loop_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    everybody_waits(monkeypatch)
    steps = Steps()
    seen: list[int] = []

    def work(turns: LoopTurns) -> None:
        for _ in range(20):
            turns.begin()
            seen.append(steps.count)
        turns.end()
        turns.end()

    began = time.monotonic()
    trio.run(steps.run, work)
    assert time.monotonic() - began < 10, "the loop waited for a turn that had ended"
    assert seen == sorted(seen)
    assert len(set(seen)) > 5, "the loop makes steps between turns"


def test_the_loop_does_not_wait_for_a_thread_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_turns, "_TURN_S_MAX", 0.05)
    steps = Steps()
    within: list[int] = []

    def work(turns: LoopTurns) -> None:
        turns.begin()
        steps.until_more_than(steps.count)
        turns.end()
        everybody_waits(monkeypatch)
        turns.begin()  # and the next one is a whole one again
        began = steps.count
        time.sleep(0.02)
        within.append(steps.count - began)
        turns.end()

    trio.run(steps.run, work)
    assert within == [0]


def test_a_thread_does_not_wait_for_ever_for_a_loop_that_does_not_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop_turns, "_TURN_S_MAX", 10.0)

    async def main() -> None:
        turns = LoopTurns(trio.lowlevel.current_trio_token())
        took: list[float] = []

        def work() -> None:
            for _ in range(3):
                began = time.monotonic()
                turns.begin()
                turns.end()
                took.append(time.monotonic() - began)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(timeout=10)  # the loop is held up here
        assert not thread.is_alive()
        assert len(took) == 3
        # The turns that it comes late for have ended: it passes them without a stop.
        began = time.monotonic()
        for _ in range(5):
            await trio.lowlevel.checkpoint()
        assert time.monotonic() - began < 5

    trio.run(main)


def test_an_applier_that_fails_in_its_turn_lets_the_loop_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_turns, "_TURN_S_MAX", 60.0)

    async def main() -> None:
        store = open_store(tmp_path)

        def broken(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(StateDb, "_write", broken)
        with pytest.raises(Exception, match="ZeroDivision"):  # noqa: PT012 – raised at its end
            async with running(store):
                await store.txn([], [put(b"k", b"1")])
                await until(lambda: store.status()["state"] == "failed")
        store.close()

    began = time.monotonic()
    trio.run(main)
    assert time.monotonic() - began < 20

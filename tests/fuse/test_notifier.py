"""The notifier: what it tells and in which order, that it never blocks its caller, and real kernel caches."""

import errno
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aspenfs.fuse.notifier import Notifier
from tests.fuse.toydaemon import DEADLINE_S, ToyDaemon


class Kernel:
    """Takes invalidations like the kernel does; `gate` closed, it keeps the caller waiting."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.failure: Exception | None = None

    def invalidate_inode(self, inode: int, attr_only: bool) -> None:
        self._take((inode, "attributes" if attr_only else "all"))

    def invalidate_entry(self, inode_p: int, name: bytes) -> None:
        self._take((inode_p, name))

    def _take(self, what: tuple[object, ...]) -> None:
        self.entered.release()
        assert self.gate.wait(10)
        self.told.append(what)
        if self.failure is not None:
            raise self.failure

    def notifier(
        self,
        known: Callable[[], list[int]] = list,
        pending_max: int = 1000,
        *,
        workers: int = 1,
        is_known: Callable[[int], bool] = lambda inode: False,
        doubt_names: Callable[[], bool] = lambda: False,
    ) -> Notifier:
        notifier = Notifier(
            known,
            is_known,
            pending_max=pending_max,
            workers=workers,
            doubt_names=doubt_names,
            invalidate_inode=self.invalidate_inode,
            invalidate_entry=self.invalidate_entry,
        )
        notifier.start()
        return notifier

    def hold(self, notifier: Notifier) -> None:
        """From here on the notifier's thread is inside a call for inode 0."""
        self.gate.clear()
        notifier.touch(0, data=False)
        assert self.entered.acquire(timeout=DEADLINE_S)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def test_what_is_noted_twice_is_told_once_and_data_wins(kernel: Kernel) -> None:
    notifier = kernel.notifier()
    kernel.hold(notifier)
    for data in (False, True, False):
        notifier.touch(7, data)
        notifier.touch(8, data=False)
        notifier.entry(1, b"name")
    kernel.gate.set()
    assert notifier.stop(DEADLINE_S)
    assert kernel.told == [(0, "attributes"), (1, b"name"), (7, "all"), (8, "attributes")]


def test_a_change_noted_during_its_own_invalidation_is_told_again(kernel: Kernel) -> None:
    notifier = kernel.notifier()
    kernel.hold(notifier)
    notifier.touch(0, data=False)
    kernel.gate.set()
    assert notifier.stop(DEADLINE_S)
    assert kernel.told == [(0, "attributes"), (0, "attributes")]


def test_names_are_told_before_inodes(kernel: Kernel) -> None:
    notifier = kernel.notifier()
    kernel.hold(notifier)
    notifier.touch(7, data=True)
    notifier.entry(1, b"late")
    kernel.gate.set()
    assert notifier.stop(DEADLINE_S)
    assert kernel.told[1:] == [(1, b"late"), (7, "all")]


def test_overflow_tells_every_known_inode_instead(kernel: Kernel) -> None:
    notifier = kernel.notifier(lambda: [3, 4], pending_max=10)
    kernel.hold(notifier)
    for inode in range(100, 111):
        notifier.touch(inode, data=False)
    notifier.entry(1, b"name")
    statistics = notifier.statistics()
    assert (statistics.pending, statistics.overflows) == (0, 1)
    kernel.gate.set()
    assert notifier.stop(DEADLINE_S)
    assert kernel.told == [(0, "attributes"), (3, "all"), (4, "all")]


def test_pending_stays_bounded_however_much_is_noted(kernel: Kernel) -> None:
    notifier = kernel.notifier(pending_max=50)
    kernel.hold(notifier)
    for inode in range(10_000):
        notifier.touch(inode, data=True)
        notifier.entry(inode, b"n")
        assert notifier.statistics().pending <= 50
    kernel.gate.set()
    assert notifier.stop(DEADLINE_S)


def test_callers_never_wait_for_the_kernel_and_busy_time_shows_it(kernel: Kernel) -> None:
    notifier = kernel.notifier()
    kernel.hold(notifier)
    began_s = time.monotonic()
    for inode in range(1000):
        notifier.touch(inode, data=True)
    assert time.monotonic() - began_s < 5.0  # the kernel would take ten
    first = notifier.statistics().busy_s
    assert notifier.statistics().busy_s > first > 0.0
    kernel.gate.set()
    assert notifier.stop(DEADLINE_S)
    assert notifier.statistics().busy_s == 0.0


def test_stop_returns_false_in_time_while_the_kernel_blocks_and_true_afterwards(kernel: Kernel) -> None:
    notifier = kernel.notifier()
    kernel.hold(notifier)
    began_s = time.monotonic()
    assert not notifier.stop(timeout_s=0.1)
    assert time.monotonic() - began_s < 5.0
    notifier.touch(5, data=True)  # dropped
    kernel.gate.set()
    assert notifier.stop(DEADLINE_S)
    assert kernel.told == [(0, "attributes")]


def test_stop_tells_what_is_pending_first(kernel: Kernel) -> None:
    notifier = kernel.notifier()
    for inode in range(1, 201):
        notifier.touch(inode, data=False)
    assert notifier.stop(DEADLINE_S)
    assert len(kernel.told) == 200


def test_stop_without_start_and_twice_is_harmless(kernel: Kernel) -> None:
    assert Notifier(list).stop()
    notifier = kernel.notifier()
    assert notifier.stop(DEADLINE_S)
    assert notifier.stop(DEADLINE_S)


def test_unknown_inodes_are_counted_and_silent(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    kernel.failure = FileNotFoundError(errno.ENOENT, "not known")
    notifier = kernel.notifier()
    notifier.touch(1, data=False)
    notifier.entry(1, b"n")
    assert notifier.stop(DEADLINE_S)
    statistics = notifier.statistics()
    assert (statistics.told, statistics.unknown) == (2, 2)
    assert caplog.records == []


def test_other_errors_are_logged_once_and_the_thread_lives_on(
    kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.failure = OSError(errno.EIO, "odd")
    notifier = kernel.notifier()
    for inode in range(1, 6):
        notifier.touch(inode, data=False)
    assert notifier.stop(DEADLINE_S)
    assert len(kernel.told) == 5
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_an_exception_of_the_callback_does_not_end_the_thread(
    kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    def known() -> list[int]:
        raise RuntimeError("dictionary changed size during iteration")

    notifier = kernel.notifier(known, pending_max=1)
    kernel.hold(notifier)
    notifier.touch(1, data=False)
    notifier.touch(2, data=False)
    kernel.gate.set()
    _wait_until(lambda: "invalidations lost" in caplog.text)
    notifier.touch(3, data=False)
    assert notifier.stop(DEADLINE_S)
    assert kernel.told[-1] == (3, "attributes")


# --- several threads ---


class Held(Kernel):
    """Takes each call for one of the `slow` inodes or directories only when it gets a token."""

    def __init__(self, *slow: int) -> None:
        super().__init__()
        self.slow = set(slow)
        self.tokens = threading.Semaphore(0)

    def _take(self, what: tuple[object, ...]) -> None:
        self.entered.release()
        if what[0] in self.slow:
            assert self.tokens.acquire(timeout=10)
        self.told.append(what)

    def go_on(self, calls: int = 1000) -> None:
        for _ in range(calls):
            self.tokens.release()


def test_a_directory_that_is_held_up_holds_up_no_other_and_no_inode() -> None:
    kernel = Held(1, 2)
    notifier = kernel.notifier(workers=4)
    for directory in (1, 2, 3):
        for name in range(200):
            notifier.entry(directory, b"%d" % name)
    notifier.touch(7, data=True)
    _wait_until(lambda: (7, "all") in kernel.told)
    _wait_until(lambda: len(kernel.told) == 201)
    assert {what[0] for what in kernel.told} == {3, 7}
    kernel.go_on()
    assert notifier.stop(DEADLINE_S)
    assert len(kernel.told) == 601


def test_names_that_are_all_held_up_hold_up_no_inode() -> None:
    kernel = Held(*range(1, 9))
    notifier = kernel.notifier(workers=4)
    for directory in kernel.slow:
        notifier.entry(directory, b"name")
    notifier.touch(70, data=True)
    _wait_until(lambda: kernel.told == [(70, "all")])
    kernel.go_on()
    assert notifier.stop(DEADLINE_S)
    assert len(kernel.told) == 9


def test_one_inode_is_told_of_by_one_thread_at_a_time_and_again_if_it_changed() -> None:
    kernel = Held(5)
    notifier = kernel.notifier(workers=4)
    notifier.touch(5, data=True)
    assert kernel.entered.acquire(timeout=DEADLINE_S)
    for _ in range(3):
        notifier.touch(5, data=True)
    notifier.touch(6, data=False)
    _wait_until(lambda: (6, "attributes") in kernel.told)
    assert not kernel.entered.acquire(timeout=0.05) or not kernel.entered.acquire(timeout=0.05)
    kernel.go_on()
    assert notifier.stop(DEADLINE_S)
    assert kernel.told.count((5, "all")) == 2


def test_pages_count_as_old_until_the_kernel_has_dropped_them() -> None:
    kernel = Held(5)
    notifier = kernel.notifier(workers=2)
    assert not notifier.holds_old_pages(5)
    notifier.touch(5, data=False)
    assert not notifier.holds_old_pages(5)
    assert notifier.is_untold(5)
    notifier.touch(5, data=True)
    assert notifier.holds_old_pages(5)
    notifier.touch(5, data=True)
    assert kernel.entered.acquire(timeout=DEADLINE_S)
    notifier.touch(5, data=True)  # while the kernel is told of it
    assert not notifier.holds_old_pages(6)
    kernel.go_on(1)
    assert kernel.entered.acquire(timeout=DEADLINE_S)
    assert notifier.holds_old_pages(5)
    kernel.go_on()
    _wait_until(lambda: not notifier.holds_old_pages(5) and not notifier.is_untold(5))
    assert notifier.stop(DEADLINE_S)


def test_until_everything_is_told_all_pages_count_as_old() -> None:
    kernel, doubts = Held(3, 5), []

    def doubt() -> bool:
        doubts.append(True)
        return True

    notifier = kernel.notifier(lambda: [4, 5], doubt_names=doubt)
    notifier.touch(3, data=True)
    assert kernel.entered.acquire(timeout=DEADLINE_S)
    notifier.touch(9, data=True)  # which nobody comes to before everything
    notifier.everything()
    kernel.go_on(1)
    _wait_until(lambda: (4, "all") in kernel.told)
    assert notifier.is_untold(1)
    assert notifier.holds_old_pages(1)
    kernel.go_on()
    _wait_until(lambda: not notifier.is_untold(1) and not notifier.holds_old_pages(1))
    assert not notifier.is_untold(9)
    assert notifier.stop(DEADLINE_S)
    assert kernel.told == [(3, "all"), (4, "all"), (5, "all")]
    assert doubts == [True]


def test_what_the_kernel_should_know_and_does_not_is_told_once_more(kernel: Kernel) -> None:
    """A LOOKUP that was answered before the change may be on its way."""
    kernel.failure = FileNotFoundError(errno.ENOENT, "not known")
    notifier = kernel.notifier(is_known={7}.__contains__)
    kernel.gate.clear()
    notifier.touch(7, data=True)
    notifier.touch(8, data=False)
    kernel.gate.set()
    _wait_until(lambda: len(kernel.told) == 3)
    assert kernel.told == [(7, "all"), (8, "attributes"), (7, "attributes")]
    assert notifier.stop(DEADLINE_S)
    assert len(kernel.told) == 3


def test_attributes_are_dropped_at_once_in_the_callers_thread(kernel: Kernel) -> None:
    kernel.failure = FileNotFoundError(errno.ENOENT, "not known")
    notifier = kernel.notifier()
    notifier.drop_attributes(3)
    assert kernel.told == [(3, "attributes")]
    assert notifier.statistics()[1:3] == (1, 1)
    assert notifier.stop(DEADLINE_S)


# --- the real kernel; entries and attributes are cached for a minute ---


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    return tmp_path / "mount"


def _told(toy: ToyDaemon, count: int) -> None:
    def done() -> bool:
        statistics = toy.ask("notifier")
        return bool(statistics["told"] >= count and not statistics["pending"] and not statistics["busy_s"])

    _wait_until(done)


@pytest.mark.mount
def test_attribute_invalidation_brings_a_new_size_to_stat(mountpoint: Path) -> None:
    with ToyDaemon(mountpoint, "--timeout", "60") as toy:
        toy.ask("grow f 10")
        size = "print(os.stat(m + '/f').st_size)"
        assert toy.run_in_mount(size) == "10"
        toy.ask("grow f 25")
        assert toy.run_in_mount(size) == "10"  # cached: else this test shows nothing
        toy.ask("touch f attributes")
        _told(toy, 1)
        assert toy.run_in_mount(size) == "25"


@pytest.mark.mount
def test_data_invalidation_brings_new_content_to_an_open_file(mountpoint: Path) -> None:
    with ToyDaemon(mountpoint, "--timeout", "60") as toy:
        toy.ask("grow f 8192")
        reader = """
f = open(m + '/f', 'rb', buffering=0)
for _ in range(3):
    f.seek(0)
    print(len(f.read(10000)), flush=True)
    sys.stdin.readline()
"""
        with toy.client(reader, stdin=True) as client:
            assert client.stdout is not None
            assert client.stdin is not None
            sizes = []
            for kind in ("grow f 100", "touch f data", None):
                sizes.append(int(client.stdout.readline()))
                if kind is not None:
                    toy.ask(kind)
                if kind == "touch f data":
                    _told(toy, 1)
                client.stdin.write("\n")
                client.stdin.flush()
        assert sizes == [8192, 8192, 100]


@pytest.mark.mount
def test_entry_invalidation_makes_a_removed_name_vanish(mountpoint: Path) -> None:
    with ToyDaemon(mountpoint, "--timeout", "60") as toy:
        toy.ask("grow f 10")
        exists = "print(os.path.exists(m + '/f'))"
        assert toy.run_in_mount(exists) == "True"
        toy.ask("drop f")
        assert toy.run_in_mount(exists) == "True"
        toy.ask("entry f")
        _told(toy, 1)
        assert toy.run_in_mount(exists) == "False"


@pytest.mark.mount
def test_everything_makes_a_removed_name_vanish_too(mountpoint: Path) -> None:
    kernel = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    with ToyDaemon(mountpoint, "--timeout", "60") as toy:
        toy.ask("grow f 10")
        looks = "print(os.path.exists(m + '/f'), os.stat(m).st_ino)"
        assert toy.run_in_mount(looks).split()[0] == "True"
        toy.ask("drop f")
        assert toy.run_in_mount(looks).split()[0] == "True"
        toy.ask("everything")
        _told(toy, 1)
        # Where names can not be doubted, they stay for their timeout.
        assert toy.run_in_mount(looks).split()[0] == str(kernel < (6, 16))


@pytest.mark.mount
def test_an_invalidation_that_the_kernel_holds_up_stops_neither_loop_nor_shutdown(mountpoint: Path) -> None:
    """While a LOOKUP of the name is in flight the kernel keeps the notifier's thread."""
    with ToyDaemon(mountpoint, "--timeout", "60") as toy:
        with toy.client("os.path.exists(m + '/hold')") as client:
            _wait_until(lambda: toy.ask("cpu")["held"] == 1)
            toy.ask("entry hold")
            _wait_until(lambda: toy.ask("notifier")["busy_s"] > 0.1)
            toy.run_in_mount("os.stat(m)")  # the loop still serves
            answer = toy.ask("stop-notifier")
            assert not answer["stopped"]
            assert answer["took_s"] < 10.0
            toy.ask("release")
            client.communicate(timeout=DEADLINE_S)
        _wait_until(lambda: bool(toy.ask("stop-notifier")["stopped"]))


def _wait_until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "in vain"
        time.sleep(0.001)

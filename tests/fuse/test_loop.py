"""The event-loop hook on real mounts: turns, ends, fairness, and idleness. Speed is `tools/bench_loop`'s."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pyfuse3
import pytest
import trio

from aspenfs.fuse import loop, turns
from tests.fuse.toydaemon import DEADLINE_S, ToyDaemon

pytestmark = pytest.mark.mount

SPINS = pytest.mark.parametrize("spin", ["0", "50"])


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    return tmp_path / "mount"


# --- turns ---


def _slow_lookups(toy: ToyDaemon, clients: int, name: str, rounds: int) -> None:
    """Has `clients` processes, each in a directory of its own, make `rounds` lookups of `name` side by side.

    In directories of their own, for the kernel sends the lookups of one directory one after another.
    """
    toy.run_in_mount(
        f"for n in range({clients}): os.path.isdir(f'{{m}}/d{{n}}') or os.mkdir(f'{{m}}/d{{n}}')"
    )
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                toy.client(
                    f"print(1, flush=True)\nsys.stdin.readline()\nfor _ in range({rounds}):\n"
                    f"    try: os.stat(f'{{m}}/d{n}/{name}')\n    except FileNotFoundError: pass",
                    stdin=True,
                )
            )
            for n in range(clients)
        ]
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        for child in children:  # all have started: off they go
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        for child in children:
            child.communicate(timeout=DEADLINE_S)


@SPINS
def test_suspended_handlers_do_not_hold_up_other_requests(mountpoint: Path, spin: str) -> None:
    with ToyDaemon(mountpoint, "--spin-us", spin) as toy:
        _slow_lookups(toy, clients=4, name="sleep-5", rounds=20)
        _slow_lookups(toy, clients=4, name="meet-4", rounds=20)  # each needs all four
        counts = toy.ask("cpu")
        assert counts["asleep_max"] == 4
        assert counts["hand_overs"] >= 40


def test_requests_wait_and_are_served_when_all_workers_are_suspended(mountpoint: Path) -> None:
    with ToyDaemon(mountpoint, "--workers", "2") as toy:
        _slow_lookups(toy, clients=6, name="sleep-20", rounds=5)
        with contextlib.ExitStack() as stack:
            held = "try: os.stat(f'{m}/d%d/hold')\nexcept FileNotFoundError: print('held')"
            children = [stack.enter_context(toy.client(held % n)) for n in range(6)]
            _wait_until(lambda: toy.ask("cpu")["held"] == 2)
            toy.ask("release")
            assert [child.communicate(timeout=DEADLINE_S)[0] for child in children] == ["held\n"] * 6
        assert toy.ask("cpu")["asleep_max"] == 2


def test_a_quick_request_overtakes_a_slow_one(mountpoint: Path) -> None:
    hold = "try: os.stat(m + '/hold')\nexcept FileNotFoundError: print('held')"
    with ToyDaemon(mountpoint) as toy, toy.client(hold) as slow:
        _wait_until(lambda: toy.ask("cpu")["held"] == 1)
        toy.run_in_mount("os.stat(m)")
        assert slow.poll() is None
        toy.ask("release")
        assert slow.communicate(timeout=DEADLINE_S)[0] == "held\n"


def test_workers_that_pyfuse3_retires_leave_someone_reading(mountpoint: Path) -> None:
    with ToyDaemon(mountpoint, "--workers", "4", "--min-workers", "1") as toy:
        for _ in range(3):
            _slow_lookups(toy, clients=4, name="sleep-5", rounds=5)
        toy.run_in_mount("os.stat(m)")


@SPINS
def test_a_mount_that_nobody_uses_costs_the_rest_of_the_daemon_nothing(mountpoint: Path, spin: str) -> None:
    with ToyDaemon(mountpoint, "--spin-us", spin) as toy:
        def dozes() -> bool:
            visits = toy.ask("cpu")["visits"]
            time.sleep(5 * turns.DOZE_S)
            return bool(toy.ask("cpu")["visits"] == visits)

        toy.run_in_mount("os.stat(m)")
        _wait_until(dozes)
        before = toy.ask("cpu")
        for _ in range(50):  # each wakes the loop
            toy.ask("cpu")
        after = toy.ask("cpu")
        assert (after["visits"], after["dozes"]) == (before["visits"], before["dozes"])


@SPINS
def test_whoever_wakes_a_mount_that_dozes_is_served(mountpoint: Path, spin: str) -> None:
    asking = "for _ in sys.stdin: print(os.path.exists(m + '/none'), flush=True)"
    with ToyDaemon(mountpoint, "--spin-us", spin) as toy:
        with toy.client(asking, stdin=True) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            dozes = 0
            for _ in range(20):
                dozes = _dozes_again(toy, dozes)
                client.stdin.write("\n")
                client.stdin.flush()
                assert client.stdout.readline() == "False\n"
        _slow_lookups(toy, clients=4, name="meet-4", rounds=20)  # and turns change hands as before
        assert toy.ask("cpu")["asleep_max"] == 4


def _dozes_again(toy: ToyDaemon, before: int) -> int:
    """Waits until it has dozed off more than `before` times; how often it has."""
    _wait_until(lambda: toy.ask("cpu")["dozes"] > before)
    return int(toy.ask("cpu")["dozes"])


def test_many_clients_get_every_answer(mountpoint: Path) -> None:
    """Create, write, read back, unlink from four processes, some lookups suspended in between."""
    code = """
for i in range(150):
    path = f"{m}/n{CLIENT}-{i}"
    with open(path, "w") as f: f.write(path)
    assert open(path).read() == path
    if i % 10 == 0:
        try: os.stat(f"{m}/sleep-2")
        except FileNotFoundError: pass
    os.unlink(path)
print("done")
"""
    with ToyDaemon(mountpoint) as toy, contextlib.ExitStack() as stack:
        children = [stack.enter_context(toy.client(f"CLIENT = {n}\n{code}")) for n in range(4)]
        assert [child.communicate(timeout=60)[0] for child in children] == ["done\n"] * 4


# --- ends ---


@SPINS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_an_idle_daemon_and_unmounts(mountpoint: Path, number: signal.Signals, spin: str) -> None:
    with ToyDaemon(mountpoint, "--idle", "--spin-us", spin) as toy:
        toy.run_in_mount("os.stat(m)")
        toy.send_signal(number)
        assert toy.ends() == 0
        assert not toy.mounted()


def test_sigterm_ends_a_saturated_daemon_with_suspended_handlers(mountpoint: Path) -> None:
    with ToyDaemon(mountpoint) as toy, _saturating(toy, 2), toy.client("os.stat(m + '/sleep-300')"):
        _wait_until(lambda: toy.ask("cpu")["requests"] > 1000)
        toy.send_signal(signal.SIGTERM)
        assert toy.ends() == 0
        assert not toy.mounted()


@pytest.mark.parametrize("command", ["stop", "cancel"])
def test_ends_by_command_while_workers_are_parked(mountpoint: Path, command: str) -> None:
    with ToyDaemon(mountpoint, "--idle") as toy:
        _slow_lookups(toy, clients=4, name="sleep-5", rounds=2)  # leaves workers parked
        toy.tell(command)
        assert toy.ends() == 0
        assert not toy.mounted()


@pytest.mark.parametrize("name", ["stop", "cancel"])
def test_ends_when_a_handler_itself_asks_for_it(mountpoint: Path, name: str) -> None:
    """Nothing else runs that could wake up a holder that has gone to block."""
    with ToyDaemon(mountpoint, "--idle") as toy:
        toy.run_in_mount(f"try: os.stat(f'{{m}}/{name}')\nexcept OSError: pass")
        assert toy.ends() == 0
        assert not toy.mounted()


def test_unmount_from_outside_ends_the_daemon(mountpoint: Path) -> None:
    with ToyDaemon(mountpoint, "--idle") as toy:
        _slow_lookups(toy, clients=4, name="sleep-5", rounds=2)
        subprocess.run(["umount", str(mountpoint)], check=True, timeout=DEADLINE_S)
        assert toy.ends() == 0


def test_killed_callers_leave_the_daemon_responsive(mountpoint: Path) -> None:
    """A fatal signal withdraws requests that are queued; the daemon must not get stuck in a read."""
    with ToyDaemon(mountpoint) as toy:
        for _ in range(30):
            with toy.client("print(1, flush=True)\nwhile True: os.stat(m)") as child:
                assert child.stdout is not None
                child.stdout.readline()
        toy.ask("cpu")  # answered by the loop, without help of a request
        toy.run_in_mount("os.stat(m)")


# --- fairness and idleness ---


@contextlib.contextmanager
def _saturating(toy: ToyDaemon, clients: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(clients):
            stack.enter_context(
                toy.client("while True:\n    try: os.stat(m + '/x')\n    except OSError: pass")
            )
        yield


@SPINS
def test_saturation_by_requests_leaves_timers_and_sockets_their_turn(mountpoint: Path, spin: str) -> None:
    with ToyDaemon(mountpoint, "--spin-us", spin) as toy, _saturating(toy, 4):
        _wait_until(lambda: toy.ask("cpu")["requests"] > 2000)
        toy.ask("lateness")
        before = toy.ask("cpu")["requests"]
        time.sleep(1.5)  # the length of the observation, not a wait for something
        assert toy.ask("cpu")["requests"] - before > 1000
        worst = toy.ask("lateness")
        assert worst["ticker_busy_ms"] < 50
        assert worst["echo_busy_ms"] < 50


@SPINS
def test_an_idle_daemon_uses_no_cpu(mountpoint: Path, spin: str) -> None:
    with ToyDaemon(mountpoint, "--idle", "--spin-us", spin) as toy:
        toy.run_in_mount("for _ in range(2000): os.stat(m)")  # so that spinning is on
        before_ns = toy.ask("cpu")["cpu_ns"]
        time.sleep(2.0)  # the length of the observation
        assert toy.ask("cpu")["cpu_ns"] - before_ns < 0.02 * 2e9


# --- installing ---


def test_install_is_active_with_the_pinned_versions_and_uninstall_restores_trio() -> None:
    try:
        assert loop.install()
        assert vars(pyfuse3)["trio"] is loop.active()
    finally:
        loop.uninstall()
    assert vars(pyfuse3)["trio"] is trio
    assert loop.active() is None


def test_install_refuses_when_pyfuse3_has_another_loop_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    import pyfuse3.asyncio

    pyfuse3.asyncio.enable()
    try:
        assert not loop.install()
    finally:
        pyfuse3.asyncio.disable()
    assert "asyncio mode" in caplog.text
    assert loop.active() is None


# --- the hook on a socket instead of /dev/fuse: what a mount cannot be made to do at will ---


async def _with_session(
    serve: Callable[[bytes], Awaitable[None]], sent: bytes, *, until: int, hook: loop.Hook | None = None
) -> list[bytes]:
    """Serves the bytes of `sent` as requests, with a loop shaped like pyfuse3's; ends after `until`."""
    hook = hook or loop.Hook(0)
    ours, theirs = socket.socketpair()
    served: list[bytes] = []
    done = trio.Event()

    async def session_loop(nursery: turns.SessionNursery, lock: turns.ReadLock | None) -> None:
        lock = lock or hook.Lock()
        while not done.is_set():
            try:
                async with lock:
                    if done.is_set():
                        return
                    await hook.wait_readable(ours.fileno())
            except trio.ClosedResourceError:
                return
            try:
                request = ours.recv(1)
            except BlockingIOError as error:
                raise OSError(error.errno, "fuse_session_receive_buf failed with EAGAIN") from error
            nursery.start_soon(session_loop, nursery, lock)
            await serve(request)
            served.append(request)
            if len(served) == until:
                done.set()
                hook.notify_closing(ours.fileno())

    with trio.fail_after(DEADLINE_S), ours, theirs:
        theirs.send(sent)
        async with hook.open_nursery() as nursery:
            nursery.start_soon(session_loop, nursery, None)
        assert not os.get_blocking(ours.fileno())  # a read for a withdrawn request must not block
    return served


def test_tasks_of_the_same_batch_run_before_the_holder_blocks() -> None:
    """Two handlers become runnable at once: the first to go on must not block with the other waiting."""

    async def main() -> None:
        released = trio.Event()
        worst_s = 0.0

        async def serve(request: bytes) -> None:
            nonlocal worst_s
            if request == b"w":
                await released.wait()
                worst_s = max(worst_s, trio.current_time() - began_s)
            elif request == b"r":
                released.set()

        for _ in range(20):  # trio orders a batch at random
            released = trio.Event()
            began_s = trio.current_time()
            await _with_session(serve, b"wwwr", until=4)
        assert worst_s < 4.0  # who blocks, does so for 5 s

    trio.run(main)


def test_an_empty_read_restarts_the_worker_and_keeps_the_session() -> None:
    async def main() -> None:
        calls = 0

        async def serve(request: bytes) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise OSError(errno.EAGAIN, "fuse_session_receive_buf failed with EAGAIN")

        assert await _with_session(serve, b"abc", until=2) == [b"a", b"c"]

    trio.run(main)


def test_another_error_of_a_worker_ends_the_session() -> None:
    async def main() -> None:
        async def serve(request: bytes) -> None:
            raise OSError(errno.EIO, "fuse_session_receive_buf failed with EIO")

        with pytest.raises(ExceptionGroup) as raised:
            await _with_session(serve, b"a", until=1)
        assert raised.group_contains(OSError, match="EIO")

    trio.run(main)


@pytest.mark.parametrize("last", [b"f", b"w"])
def test_cancelling_parked_workers_with_the_holder_blocked_or_a_handler_suspended(last: bytes) -> None:
    async def main() -> None:
        with trio.move_on_after(0.05) as scope:

            async def serve(request: bytes) -> None:
                if request == b"w":
                    await trio.sleep_forever()
                await trio.sleep(0.001)

            await _with_session(serve, b"sss" + last, until=99)
        assert scope.cancelled_caught

    trio.run(main)


def test_a_guest_loop_falls_back_to_waiting_through_trio() -> None:
    """Where trio's private parts are not as expected, requests are served all the same."""

    async def main() -> None:
        async def serve(request: bytes) -> None:
            await trio.sleep(0.005)  # so that another worker waits when the last one ends the session

        hook = loop.Hook(0)
        assert sorted(await _with_session(serve, b"abcd", until=4, hook=hook)) == [b"a", b"b", b"c", b"d"]
        assert hook.session is not None
        assert not hook.session.direct

    calls: list[Callable[[], object]] = []
    ended: list[object] = []
    semaphore = threading.Semaphore(0)

    def schedule(function: Callable[[], object]) -> None:
        calls.append(function)
        semaphore.release()

    trio.lowlevel.start_guest_run(
        main,
        run_sync_soon_threadsafe=schedule,
        done_callback=ended.append,
        host_uses_signal_set_wakeup_fd=True,
    )
    while not ended:
        assert semaphore.acquire(timeout=DEADLINE_S)
        calls.pop(0)()
    getattr(ended[0], "unwrap")()  # noqa: B009 – an outcome


def _wait_until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "in vain"
        os.sched_yield()

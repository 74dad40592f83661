"""The hook that lets pyfuse3 serve request after request without a trip through trio's scheduler.

Stock pyfuse3 spends most of its time per request in handing the reading of /dev/fuse from one trio task
to the next. It looks the name `trio` up in its own module at each use, so an object that stands in for
the module can do better: `docs/adr/0003-fuse-event-loop-hook.md`. Here are that object and its
installation. Whose turn it is to read is `turns.py`; waiting in trio's place is `idle.py`.

While a session runs, `trio.testing.wait_all_tasks_blocked` may not return, because the holder of the
turn does the idle waiting, unless it dozes.
"""

import importlib.metadata
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

import pyfuse3
import trio

from aspenfs import limits
from aspenfs.fuse import idle
from aspenfs.fuse.turns import DOZE_S, ReadLock, Session, SessionNursery

logger = logging.getLogger(__name__)

PINNED: Final = {"pyfuse3": "3.5.", "trio": "0.35."}  # the series whose insides this was written against
WORKERS: Final = limits.REQUESTS_IN_FLIGHT_MAX  # for pyfuse3.main, as min_tasks and as max_tasks
SPIN_US: Final = idle.SPIN_US


class Hook:
    """Stands in for the `trio` module inside pyfuse3, and for `trio.lowlevel` as well.

    Names that are not here come from trio. `session` is that of the running, or the last, `pyfuse3.main`.
    """

    ClosedResourceError = trio.ClosedResourceError

    def __init__(self, spin_us: int = SPIN_US, hush: Callable[[], bool] = lambda: False,
                 doze_s: float = DOZE_S) -> None:
        self.spin_us, self.hush, self.doze_s = spin_us, hush, doze_s
        self.lowlevel = self
        self.current_task = trio.lowlevel.current_task
        self.current_trio_token = trio.lowlevel.current_trio_token
        self.session: Session | None = None

    def open_nursery(self) -> SessionNursery:
        """pyfuse3 calls it once for each run of `main`: a session begins."""
        self.session = session = Session(self.spin_us, self.hush, self.doze_s)
        # Bound once per session: one attribute look-up less for each request.
        self.wait_readable = session.wait_readable
        self.notify_closing = session.notify_closing
        return SessionNursery(session)

    def Lock(self) -> ReadLock:
        assert self.session is not None
        return ReadLock(self.session)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio if hasattr(trio, name) else trio.lowlevel, name)


# --- installing ---

_hook: Hook | None = None


def install(*, spin_us: int = SPIN_US, hush: Callable[[], bool] = lambda: False) -> bool:
    """Puts the hook into pyfuse3, and says whether it is active; if not, the log says why.

    To be called before `pyfuse3.main`, then `pyfuse3.main(min_tasks=WORKERS, max_tasks=WORKERS)`; that
    call is also right without the hook. `spin_us` = 0 turns spinning off, `hush` does while it says True:
    then a thread of this process is at work for somebody who waits. Takes some 10 ms for a test of the
    hook against the trio at hand. A second call only changes the two for the next session.
    """
    global _hook
    if _hook is not None:
        _hook.spin_us, _hook.hush = spin_us, hush
        return True
    cause = _wrong_version() or _wrong_pyfuse3() or self_test()
    if cause is not None:
        logger.warning("fuse event-loop hook is off, requests cost about five times more: cause=%s", cause)
        return False
    _hook = Hook(spin_us, hush)
    vars(pyfuse3)["trio"] = _hook
    logger.info("fuse event-loop hook is on: spin_us=%d", spin_us)
    return True


def uninstall() -> None:
    """Gives pyfuse3 its trio back; not to be called while `pyfuse3.main` runs."""
    global _hook
    _hook = None
    vars(pyfuse3)["trio"] = trio


def active() -> Hook | None:
    """The installed hook, for its counters."""
    return _hook


def serving() -> object | None:
    """pyfuse3's coroutine that serves the request under way, if the hook is there to know."""
    session = None if _hook is None else _hook.session
    return None if session is None else session.serving()


def _wrong_version() -> str | None:
    for package, series in PINNED.items():
        version = importlib.metadata.version(package)
        if not version.startswith(series):
            return f"{package} {version} instead of {series}x"
    return None


def _wrong_pyfuse3() -> str | None:
    if vars(pyfuse3).get("trio") is not trio:
        return "pyfuse3 does not use trio (asyncio mode, or another hook)"
    if not {"_session_loop", "_wait_fuse_readable"} <= vars(pyfuse3).keys():
        return "pyfuse3 has another main loop"
    return None


def self_test() -> str | None:
    """Runs the hook in a thread's own trio loop, a socket in the place of /dev/fuse; None if all is well.

    Tried: a hand-over while a handler is suspended, a timer and a wake-up from another thread while the
    holder blocks, and the end of a session; and the same with a holder that dozes as soon as it waits.
    """
    outcome: list[str | None] = ["it did not end within 5 s"]
    ours, theirs = socket.socketpair()

    def run() -> None:
        try:
            for doze_s in (DOZE_S, 0.0):
                trio.run(_exercise, ours, theirs, doze_s)
            outcome[0] = None
        except BaseException as error:  # whatever it is: do not use the hook
            outcome[0] = f"self-test: {error!r}"

    thread = threading.Thread(target=run, name="fuse-loop-self-test", daemon=True)
    thread.start()
    thread.join(5.0)
    if not thread.is_alive():
        ours.close()
        theirs.close()
    return outcome[0]


async def _exercise(ours: socket.socket, theirs: socket.socket, doze_s: float) -> None:
    hook = Hook(0, doze_s=doze_s)
    woken, released, finished, ended = trio.Event(), trio.Event(), trio.Event(), trio.Event()
    served: list[bytes] = []
    lock: list[ReadLock] = []

    async def session_loop(nursery: SessionNursery) -> None:  # shaped like pyfuse3's
        if not lock:
            lock.append(hook.Lock())
        while not ended.is_set():
            try:
                async with lock[0]:
                    if ended.is_set():
                        return
                    await hook.wait_readable(ours.fileno())
            except trio.ClosedResourceError:
                return
            request = ours.recv(1)
            nursery.start_soon(session_loop, nursery)
            if request == b"w":
                await released.wait()
            elif request == b"r":
                released.set()
            served.append(request)
            if len(served) == 4:
                finished.set()

    with trio.fail_after(3.0):
        token = trio.lowlevel.current_trio_token()
        async with hook.open_nursery() as nursery:
            assert hook.session is not None
            assert hook.session.direct, hook.session.cause
            nursery.start_soon(session_loop, nursery)
            await trio.sleep(0.001)
            threading.Timer(0.001, token.run_sync_soon, (woken.set,)).start()
            await woken.wait()
            theirs.send(b"1wr1")
            await finished.wait()
            if not doze_s:
                for _ in range(1_000):
                    if hook.session.dozes > 1:  # before the requests, and now
                        break
                    await trio.sleep(0.001)
                assert hook.session.dozes > 1, "it does not doze"
            ended.set()
            hook.notify_closing(ours.fileno())
    assert sorted(served) == [b"1", b"1", b"r", b"w"], served

"""Runs `toyfs.py` as a process with a mount of its own, and gets rid of both whatever happens.

Everything that touches the mount runs in child processes with a deadline: a hung mount fails a test, it
does not hang the run.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0  # of a busy machine; what hangs, hangs longer
MNT_FORCE, MNT_DETACH = 1, 2


class ToyDaemon:
    """`with ToyDaemon(directory, "--spin-us", "0") as toy:` is mounted and served inside."""

    script = "tests/fuse/toyfs.py"

    def __init__(self, mountpoint: Path, *options: str, cpus: Sequence[int] | None = None) -> None:
        self.mountpoint = mountpoint
        mountpoint.mkdir(exist_ok=True)
        self._buffer = b""
        self._forgotten = False
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / self.script), str(mountpoint), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
        )

    def __enter__(self) -> Self:
        try:
            assert self._line().startswith("ready")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """Idempotent. Aborts the connection first: a process in the kernel's hands dies only then."""
        if self._forgotten:
            return
        if self.process.poll() is None or self.mounted():
            # MNT_FORCE on a FUSE mount aborts its connection; MNT_DETACH takes the mount away.
            libc = ctypes.CDLL(None, use_errno=True)
            for flags in (MNT_FORCE, MNT_DETACH):
                libc.umount2(os.fsencode(self.mountpoint), flags)
        if self.process.poll() is None:
            self.process.kill()
        self.forget()
        with contextlib.suppress(FileNotFoundError):
            self.mountpoint.rmdir()

    def forget(self) -> None:
        """Closes the pipes of a daemon that has ended, and leaves its mountpoint alone."""
        self._forgotten = True
        self.process.wait(DEADLINE_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def mounted(self) -> bool:
        escaped = os.fsencode(self.mountpoint).replace(b" ", rb"\040")
        return escaped in Path("/proc/self/mountinfo").read_bytes().split()

    def _line(self) -> str:
        assert self.process.stdout is not None
        end_s = time.monotonic() + DEADLINE_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end_s - time.monotonic())):
                    raise TimeoutError("the toy daemon says nothing")
                received = os.read(self.process.stdout.fileno(), 65536)
                if not received:
                    raise EOFError(f"the toy daemon ended: {self.process.wait(DEADLINE_S)}")
                self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def run_in_mount(self, code: str, *, deadline_s: float = DEADLINE_S) -> str:
        """Output of a Python snippet in a child whose `m` is the mountpoint; an error fails the test."""
        with self.client(code) as child:
            output, _ = child.communicate(timeout=deadline_s)
            assert child.returncode == 0, (child.returncode, output)
        return str(output).strip()

    @contextlib.contextmanager
    def client(
        self, code: str, *, cpus: Sequence[int] | None = None, stdin: bool = False
    ) -> Iterator[subprocess.Popen[str]]:
        """A Python snippet in a child of its own, `m` being the mountpoint; killed at the end."""
        child = subprocess.Popen(
            [sys.executable, "-c", f"import os, sys, time\nm = {str(self.mountpoint)!r}\n{code}"],
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
        )
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()
            try:
                child.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()  # a client in the kernel's hands goes when the connection is aborted
                child.wait(DEADLINE_S)
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()

    def ends(self, *, deadline_s: float = DEADLINE_S) -> int:
        """Waits for the daemon to end by itself; its exit status."""
        return self.process.wait(deadline_s)

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

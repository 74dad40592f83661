"""A real aspenfs mount for tests: `mount.aspen`, a daemon, a mountpoint; and its end, whatever happens.

A process that waits on a hung FUSE mount cannot be interrupted, not even by SIGKILL. So every mount has a
watchdog thread: past the deadline it aborts the connection, which ends all waits with ENOTCONN.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


class Mount:
    """A state directory and a mountpoint of their own; `start` and `stop` as often as wanted."""

    def __init__(self, options: str = "", *, deadline_s: float = 110.0) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="aspen-test-"))
        self.base.chmod(0o755)  # other users go through it to the mountpoint
        self.mountpoint, self.state = self.base / "mnt", self.base / "state"
        self.mountpoint.mkdir()
        self.options = options
        self.pid = 0
        self.environment = {
            "ASPEN_STATE_DIR": str(self.state),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.deadline_s = deadline_s
        self._watchdog: threading.Timer | None = None
        self.log_seen = 0

    # --- life ---

    def start(self, options: str | None = None, spec: str = "demo") -> "Mount":
        """Mounts; returns when the mount answers."""
        chosen = ",".join(
            filter(None, ["create", f"state_dir={self.state}", self.options if options is None else options])
        )
        command = [sys.executable, "-m", "aspenfs.cli.mount", spec, str(self.mountpoint), "-o", chosen]
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"mount.aspen: exit {done.returncode}: {done.stdout}{done.stderr}")
        self.pid = int((self.state / "daemon.pid").read_text())
        self.extend()
        assert self.is_mounted()
        return self

    def rest(self) -> None:
        """Nobody uses the mount for now: no deadline."""
        if self._watchdog is not None:
            self._watchdog.cancel()

    def extend(self, deadline_s: float | None = None) -> None:
        """Starts the watchdog anew; each test calls it through the fixture."""
        self.rest()
        self._watchdog = threading.Timer(deadline_s or self.deadline_s, self._abort)
        self._watchdog.daemon = True
        self._watchdog.start()

    def _abort(self) -> None:
        print(f"watchdog: {self.mountpoint} is over its deadline; aborting", file=sys.stderr)
        self.kill()
        number = self.connection()
        if number is not None:
            subprocess.run(
                ["mount", "-t", "fusectl", "none", "/sys/fs/fuse/connections"],
                check=False,
                capture_output=True,
            )
            abort = Path(f"/sys/fs/fuse/connections/{number}/abort")
            if abort.exists():
                abort.write_text("1")

    def stop(self) -> None:
        """umount, and the daemon's own end; what is not accepted within 30 s is a failure."""
        subprocess.run(["umount", str(self.mountpoint)], check=True, capture_output=True, timeout=30)
        assert wait_for(lambda: not alive(self.pid), 30), "the daemon did not end after umount"
        self.pid = 0

    def kill(self) -> None:
        """SIGKILL; the mount stays behind, dead."""
        if self.pid and alive(self.pid):
            os.kill(self.pid, signal.SIGKILL)
            assert wait_for(lambda: not alive(self.pid), 60)

    def close(self) -> None:
        """Leaves nothing behind: no process, no mount, no directory."""
        self.rest()
        if self.pid and alive(self.pid) and self.is_mounted():
            done = subprocess.run(
                ["umount", str(self.mountpoint)], check=False, capture_output=True, timeout=30
            )
            # Busy: a test that failed has left a file open. There is nothing to wait for.
            if done.returncode == 0:
                wait_for(lambda: not alive(self.pid), 20)
        self.kill()
        while self.is_mounted():
            subprocess.run(
                ["umount", "-l", str(self.mountpoint)], check=False, capture_output=True, timeout=30
            )
        shutil.rmtree(self.base)

    # --- looking ---

    def _mountinfo(self) -> list[str]:
        wanted = str(self.mountpoint)
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if line.split()[4] == wanted]

    def is_mounted(self) -> bool:
        return any(" - fuse.aspen " in line for line in self._mountinfo())

    def connection(self) -> int | None:
        """The number of the FUSE connection: the minor number of the mount's device."""
        for line in self._mountinfo():
            return int(line.split()[2].split(":")[1])
        return None

    def new_log(self) -> str:
        """What the daemon has logged since the last call."""
        path = self.state / "daemon.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        fresh, self.log_seen = text[self.log_seen :], len(text)
        return fresh

    def assert_healthy(self) -> None:
        """The daemon lives, is mounted, and has nothing to complain about."""
        assert alive(self.pid), f"the daemon ended:\n{self.new_log()}"
        assert self.is_mounted()
        complaints = re.findall(r"^.*(?: WARNING | ERROR |Traceback).*$", self.new_log(), re.MULTILINE)
        assert not complaints, "\n".join(complaints)

    def aspen(self, *arguments: str, stdin: bytes = b"", check: bool = True) -> bytes:
        """Runs the command line program against this mount's daemon; its standard output."""
        done = subprocess.run(
            [str(BIN / "aspen"), *arguments],
            env={**os.environ, **self.environment},
            input=stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr.decode()
        return done.stdout


def alive(pid: int) -> bool:
    """Whether any of its threads is left. A killed process whose sync thread still waits for the disk shows
    as a zombie, but holds its files: its mount does not answer, and its locks are not free."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(_runs(f"/proc/{pid}/task/{thread}/stat") for thread in threads)


def _runs(path: str) -> bool:
    try:
        state = Path(path).read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Polls until `condition` holds; False if it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True

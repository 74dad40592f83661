"""A daemon in the foreground under a service manager of ours, which sees what it says and how it ends."""

import os
import signal
import socket
import subprocess
import sys

from tests.mount.mounting import Mount

DEADLINE_S = 60.0


class Service:
    """`mount.aspen -f` on the directories of a `Mount` that is not started, as with systemd's Type=notify."""

    def __init__(self, mount: Mount, options: str = "", spec: str = "demo") -> None:
        self.mount = mount
        path = str(mount.base / "notify")
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(path)
        self.manager.settimeout(DEADLINE_S)
        chosen = ",".join(filter(None, ["create", f"state_dir={mount.state}", options]))
        command = [sys.executable, "-m", "aspenfs.cli.mount", "-f", spec, str(mount.mountpoint), "-o", chosen]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **mount.environment, "NOTIFY_SOCKET": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        mount.pid = self.process.pid  # mount.aspen becomes the daemon
        mount.extend()

    def hear(self) -> dict[str, str]:
        """The next message, as systemd would read it."""
        lines = self.manager.recv(4096).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Sends a signal; the exit code, and what was on stderr."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        _, text = self.process.communicate(timeout=DEADLINE_S)
        self.manager.close()
        return self.process.returncode, text

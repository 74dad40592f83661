"""The README's session on three hosts, line by line, as newcomers would type it.

Each host has a network, a name and a view of the file system of its own, so the lines are typed as they are.
Where namespaces are not allowed all run on this one, and paths and addresses are put in.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mount.mounting import BIN, ROOT, alive, wait_for
from tests.mount.networks import PORT, HostNetwork, Network, usable_network

pytestmark = pytest.mark.mount
README = Path(__file__).parents[3] / "README.md"
HOSTS = {"a": 1, "b": 2, "c": 3}
MOUNTPOINT, STATE = "/mnt/aspen", "/var/lib/aspenfs"
COMMAND_S = 60
SETTLES_S = 30  # what is asked for here comes about by itself, but who types it may be quicker
SETTLING = ("aspen status", "cat /mnt/aspen/cluster/")
ANYTHING = "…"

SET_UP = f"""
hostname $NAME
mount -t tmpfs none /mnt
mount -t tmpfs none /var/lib
mkdir {MOUNTPOINT} {STATE}
mount --bind $BASE {STATE}
"""


class Step(NamedTuple):
    host: str
    command: str
    expected: str


def steps() -> list[Step]:
    """Each line that is typed on a host, with what it prints; `…` stands for anything on a line."""
    (block,) = re.findall(r"```console\n(a\$ .*?)```", README.read_text(), re.DOTALL)
    found: list[Step] = []
    for line in block.splitlines(keepends=True):
        if typed := re.fullmatch(r"([abc])\$ (.*)\n", line):
            found.append(Step(typed[1], typed[2], ""))
        else:
            found[-1] = found[-1]._replace(expected=found[-1].expected + line)
    return found


class Place:
    """Where the lines of one host are typed."""

    def __init__(self, name: str, network: Network, base: Path) -> None:
        self.network, self.number = network, HOSTS[name]
        self.base = base / name
        self.base.mkdir()
        self.environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": "/root"}
        self.own = isinstance(network, HostNetwork)
        if self.own:
            self.environment |= {"NAME": name, "BASE": str(self.base)}
            self.run(SET_UP)
            self.state = self.base
        else:
            self.state = self.base / "state"
            (self.base / "mnt").mkdir()
            addresses = f"--listen {network.listen(self.number)} --advertise {network.advertise(self.number)}"
            self.environment |= {"ASPEN_STATE_DIR": str(self.state), "MORE": f"{addresses} --name {name}"}

    def run(self, command: str) -> str:
        """What the line printed."""
        if not self.own:
            command = command.replace(MOUNTPOINT, f"{self.base}/mnt").replace(STATE, str(self.state))
            command = re.sub(r"^aspen (init|join) .*", r"\g<0> $MORE", command)
        done = subprocess.run(
            [*self.network.place(self.number), "bash", "-eu", "-c", command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout if self.own else self._as_on_a_host(done.stdout)

    def _as_on_a_host(self, printed: str) -> str:
        pid = self.state / "daemon.pid"
        if pid.exists():
            self.network.started(self.number, int(pid.read_text()))
        printed = printed.replace(f"{self.base}/mnt", MOUNTPOINT).replace(str(self.state), STATE)
        printed = printed.replace(self.network.listen(self.number), f"*:{PORT}")
        return printed.replace(self.network.advertise(self.number), f"host:{PORT}")

    def close(self) -> None:
        """Ends the daemon; the mount goes with the host, or is taken away."""
        pid = self.state / "daemon.pid"
        if pid.exists() and alive(number := int(pid.read_text())):
            os.kill(number, signal.SIGKILL)
            assert wait_for(lambda: not alive(number), COMMAND_S)
        if not self.own:
            while f" {self.base}/mnt " in Path("/proc/self/mountinfo").read_text():
                subprocess.run(["umount", "-l", f"{self.base}/mnt"], check=True, timeout=COMMAND_S)


@pytest.fixture
def places() -> Iterator[dict[str, Place]]:
    network = usable_network(len(HOSTS), whole=True)
    base = Path(tempfile.mkdtemp(prefix="aspen-readme-"))
    closing: list[Callable[[], None]] = [network.close]
    try:
        places = {}
        for name in HOSTS:
            places[name] = Place(name, network, base)
            closing.insert(0, places[name].close)
        yield places
    finally:
        for close in closing:
            close()
        shutil.rmtree(base)


def pattern(expected: str) -> str:
    return ".*".join(map(re.escape, expected.split(ANYTHING)))


def typed(place: Place, command: str, expected: str) -> str:
    """What the line printed; typed again, if it asks for what is to come, until that is there."""
    if command.endswith("/cluster/leader") and place.run(command) != expected:
        place.run(f"aspen leader transfer {expected}")  # on a busy machine another may have been elected
    end = time.monotonic() + SETTLES_S
    while True:
        printed = place.run(command)
        is_right = re.fullmatch(pattern(expected), printed)
        if is_right or not command.startswith(SETTLING) or time.monotonic() > end:
            return printed
        time.sleep(0.1)


def test_the_session_on_three_hosts_prints_what_the_readme_says(places: dict[str, Place]) -> None:
    session = steps()
    assert {step.host for step in session} == set(HOSTS)
    ticket = ""
    for host, command, expected in session:
        printed = typed(places[host], command.replace(f"aspen1-{ANYTHING}", ticket), expected)
        assert re.fullmatch(pattern(expected), printed), f"{host}$ {command}\n{printed}"
        if found := re.search(r"aspen1-\S+", printed):
            ticket = found[0]

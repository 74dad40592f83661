"""Where the nodes of a test's cluster meet: hosts of their own on one bridge, or loopback through a proxy.

Belongs here: addresses, running a process at a node's place, cutting and mending the ways between nodes,
one direction at a time. Not here: nodes (`clusters.py`).

`HostNetwork` gives each node a network namespace with one interface on a common bridge. No namespace has a
name, and none of it is in the machine's own: all is held by `cat` processes that end when the test process
does, however it ends, and then nothing of it is left. `ProxyNetwork` is for where namespaces are not allowed.
"""

import contextlib
import os
import select
import socket
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Final

PORT: Final = 7420
_SUBNET: Final = "10.77.0"  # seen by nobody else: the bridge has no way out
_NOBODY: Final = "02:00:00:00:00:ff"  # an Ethernet address at which no one listens
_PIECE: Final = 64 * 1024


class Network(ABC):
    """Nodes are numbered from 1. A way that was cut swallows what is sent on it, as a broken cable would."""

    @abstractmethod
    def listen(self, node: int) -> str:
        """HOST:PORT, for `--listen`."""

    @abstractmethod
    def advertise(self, node: int) -> str:
        """HOST:PORT at which the others reach the node."""

    @abstractmethod
    def place(self, node: int) -> list[str]:
        """What a command begins with to run at the node's place."""

    @abstractmethod
    def cut(self, source: int, *targets: int) -> None:
        """From now on nothing of `source` reaches these; the other direction stays as it is."""

    @abstractmethod
    def mend(self) -> None:
        """All ways are open again."""

    @abstractmethod
    def started(self, node: int, pid: int) -> None:
        """A process, its daemon or another one, was started at the node's place."""

    @abstractmethod
    def close(self) -> None: ...


def usable_network(nodes: int, *, whole: bool = False) -> Network:
    """Hosts where the kernel lets us have them, else the proxy. ASPEN_TEST_NETWORK=proxy wants the proxy."""
    if os.environ.get("ASPEN_TEST_NETWORK") == "proxy" or not namespaces_work():
        return ProxyNetwork(nodes)
    return HostNetwork(nodes, whole=whole)


def namespaces_work() -> bool:
    done = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "aspen0", "type", "bridge"],
        capture_output=True,
        timeout=30,
        check=False,
    )
    return done.returncode == 0


class Host:
    """Namespaces that live as long as this process wants them, at most as long as it lives.

    With `whole` mounts and host name are the host's own too, else its network alone.
    """

    def __init__(self, *, whole: bool = False) -> None:
        kinds = ["--net", "--mount", "--uts"] if whole else ["--net"]
        # cat ends when the other end of its stdin is gone. It answers when it is there.
        self._holder = subprocess.Popen(
            ["unshare", *kinds, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.write(b"?")
        if self._holder.stdout.read(1) != b"?":
            raise OSError("no namespaces here")
        self.pid = self._holder.pid
        names = [kind.removeprefix("--").replace("mount", "mnt") for kind in kinds]
        paths = [f"{kind}=/proc/{self.pid}/ns/{name}" for kind, name in zip(kinds, names, strict=True)]
        self.place = ["nsenter", *paths, *(["--wd=/"] if whole else [])]

    def run(self, *command: str, stdin: str = "") -> None:
        subprocess.run([*self.place, *command], input=stdin, text=True, check=True, timeout=30)

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()


class HostNetwork(Network):
    """A bridge, and a host on it for each node. Ways are cut at the sender: it sends to a wrong Ethernet
    address, so what it sends is lost without a word, and what it receives is not."""

    def __init__(self, nodes: int, *, whole: bool = False) -> None:
        self.nodes = range(1, nodes + 1)
        self._bridge = Host()
        self.hosts: dict[int, Host] = {}
        try:
            self._bridge.run("ip", "link", "add", "bridge", "type", "bridge")
            self._bridge.run("ip", "link", "set", "bridge", "up")
            for node in self.nodes:
                self.hosts[node] = Host(whole=whole)
                self._connect(node)
            self.mend()
        except BaseException:
            self.close()
            raise

    def _connect(self, node: int) -> None:
        host = self.hosts[node]
        self._bridge.run(
            "ip",
            "-batch",
            "-",
            stdin=f"link add port{node} master bridge type veth peer name eth0 address {_ethernet(node)}"
            f" netns {host.pid}\nlink set port{node} up\n",
        )
        host.run(
            "ip",
            "-batch",
            "-",
            stdin=f"link set lo up\naddress add {_address(node)}/24 dev eth0\nlink set eth0 up\n"
            f"route add default via {_address(254)}\n",
        )

    def _ways(self, source: int, ethernets: Mapping[int, str]) -> None:
        lines = [
            f"neighbor replace {_address(target)} lladdr {ethernet} dev eth0 nud permanent\n"
            for target, ethernet in ethernets.items()
        ]
        self.hosts[source].run("ip", "-batch", "-", stdin="".join(lines))

    def listen(self, node: int) -> str:
        return f"{_address(node)}:{PORT}"

    advertise = listen

    def place(self, node: int) -> list[str]:
        return self.hosts[node].place

    def started(self, node: int, pid: int) -> None:
        """Its place tells who it is."""

    def cut(self, source: int, *targets: int) -> None:
        self._ways(source, dict.fromkeys(targets, _NOBODY))

    def mend(self) -> None:
        for source in self.nodes:
            self._ways(source, {node: _ethernet(node) for node in self.nodes if node != source})

    def close(self) -> None:
        for host in (*self.hosts.values(), self._bridge):
            host.close()


def _address(node: int) -> str:
    return f"{_SUBNET}.{node}"


def _ethernet(node: int) -> str:
    return f"02:00:00:00:00:{node:02x}"


class _Wire:
    """A connection through the proxy. `source` 0: nobody knows yet who has made it."""

    def __init__(self, connection: socket.socket, source: int, target: int) -> None:
        self.connection, self.source, self.target = connection, source, target


class ProxyNetwork(Network):
    """Loopback: each node advertises a port of this process, which passes everything on, or holds it.

    Bytes on a way that is cut are held until it is mended, as TCP would send them again then. Who has
    connected is found by looking for the socket among those of the daemons: /proc.
    """

    def __init__(self, nodes: int) -> None:
        self.nodes = range(1, nodes + 1)
        self._pids: dict[int, set[int]] = {node: set() for node in self.nodes}
        self._cut: set[tuple[int, int]] = set()
        self._changed = threading.Condition()
        self._wires: set[_Wire] = set()
        self._over = False
        self._listeners: dict[int, socket.socket] = {}
        self._targets: dict[int, tuple[str, int]] = {}
        for node in self.nodes:
            listener = socket.create_server((_loopback(node), 0))
            self._listeners[node] = listener
            self._targets[node] = (_loopback(node), _free_port(_loopback(node)))
            threading.Thread(target=self._accept, args=(node, listener), daemon=True).start()

    def listen(self, node: int) -> str:
        host, port = self._targets[node]
        return f"{host}:{port}"

    def advertise(self, node: int) -> str:
        host, port = self._listeners[node].getsockname()
        return f"{host}:{port}"

    def place(self, node: int) -> list[str]:
        return []

    def started(self, node: int, pid: int) -> None:
        self._pids[node].add(pid)
        with self._changed:
            unknown = [wire for wire in self._wires if not wire.source]
        for wire in unknown:  # it may have connected before anybody told
            with contextlib.suppress(OSError):
                wire.source = self._source(wire.connection)

    def cut(self, source: int, *targets: int) -> None:
        with self._changed:
            self._cut.update((source, target) for target in targets)

    def mend(self) -> None:
        with self._changed:
            self._cut.clear()
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._over = True
            self._cut.clear()
            self._changed.notify_all()
        for listener in self._listeners.values():
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
            listener.close()

    def _accept(self, target: int, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, target), daemon=True).start()

    def _serve(self, connection: socket.socket, target: int) -> None:
        with connection:
            wire = _Wire(connection, self._source(connection), target)
            with self._changed:
                self._wires.add(wire)
            if not wire.source:  # `started` may have come between the look above and this list
                wire.source = self._source(connection)
            try:
                self._connect(wire)
            finally:
                with self._changed:
                    self._wires.discard(wire)

    def _connect(self, wire: "_Wire") -> None:
        self._wait_open(wire, forth=True)
        self._wait_open(wire, forth=False)  # the answer to a SYN goes this way
        try:
            onward = socket.create_connection(self._targets[wire.target], timeout=2)
        except OSError:
            return
        with onward:
            onward.settimeout(None)
            arguments = (onward, wire.connection, wire, False)
            back = threading.Thread(target=self._pass, args=arguments, daemon=True)
            back.start()
            self._pass(wire.connection, onward, wire, True)
            back.join()

    def _pass(self, reader: socket.socket, writer: socket.socket, wire: "_Wire", forth: bool) -> None:
        """One direction of a connection, until either end is gone."""
        with contextlib.suppress(OSError):
            while True:
                select.select([reader], [], [])
                self._wait_open(wire, forth=forth)
                data = reader.recv(_PIECE)
                if not data or self._over:
                    break
                self._wait_open(wire, forth=forth)
                writer.sendall(data)
        for end in (reader, writer):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _wait_open(self, wire: "_Wire", *, forth: bool) -> None:
        """Waits while the way is cut."""

        def is_open() -> bool:
            way = (wire.source, wire.target) if forth else (wire.target, wire.source)
            return way not in self._cut

        with self._changed:
            self._changed.wait_for(is_open)

    def _source(self, connection: socket.socket) -> int:
        """The node at whose place the other end is; 0 for a process that nobody has told of."""
        host, port = connection.getpeername()
        wanted = f"{int.from_bytes(socket.inet_aton(host), 'little'):08X}:{port:04X}"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == wanted and fields[9] != "0":
                name = f"socket:[{fields[9]}]"
                return next((node for node, pids in self._pids.items() if _hold(pids, name)), 0)
        return 0


def _hold(pids: set[int], name: str) -> bool:
    """Whether one of these processes has that file open. Those that have ended are dropped."""
    for pid in list(pids):
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        if os.readlink(entry.path) == name:
                            return True
        except OSError:
            pids.discard(pid)
    return False


def _loopback(node: int) -> str:
    return f"127.0.0.{10 + node}"


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])

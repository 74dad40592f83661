"""`aspen join`: this host becomes a member of a cluster, mounted, and in step with the others.

Belongs here: the command, what it tells meanwhile, when it is done. Not here: the exchange with the
cluster (`runtime/peers/join.py`), making and unmaking the state directory (`founding.py`).
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

import click
import trio

from aspenfs import errors
from aspenfs.cli import mount
from aspenfs.cli.aspen import Settings
from aspenfs.cli.client import Client
from aspenfs.cli.founding import Making, NodeOptions, Wanted, node_options
from aspenfs.cli.kv import json_option
from aspenfs.cli.output import EXIT_CODES_HELP, EXIT_INTERRUPTED, Failure, failures, print_json
from aspenfs.cli.reporter import Reporter
from aspenfs.limits import LEARNER_LAG_MAX, PEER_BACKOFF_MS_MAX
from aspenfs.runtime import contacts, peer_settings
from aspenfs.runtime.peers import tickets
from aspenfs.runtime.peers.join import Joined
from aspenfs.runtime.peers.join import join as ask_to_join
from aspenfs.runtime.peers.tickets import Ticket
from aspenfs.runtime.system import SystemClock, SystemEntropy

_ASK_S = 10.0  # in all, while the cluster does not answer: it may be electing a leader
_PATIENCE_S = 60.0  # without getting any nearer
_UNREACHED_S = 30.0  # admitted, and nobody comes
_LOOK_S = 0.2
_LINE_MAX = 10_000  # more than any ticket has
# A cluster that says one of these may say yes a little later.
_PASSING = (errors.PeerUnreachable, errors.NoQuorum, errors.NotLeader, errors.Overloaded, errors.Busy)


@click.command(epilog=f"""\b
Examples:
  aspen join aspen1-k7Yc… /mnt/aspen
  aspen join aspen1-k7Yc… /mnt/aspen --listen 192.0.2.8:7420 --name db2
  aspen join aspen1-k7Yc… /mnt/aspen --learner
  aspen ticket create --quiet | ssh db2 aspen join - /mnt/aspen

\b
It begins as a learner, fetches the state, and becomes a voter by itself when it has caught up; the command
returns then. At the next boot `mount -t aspen NAME DIR`, or a line in /etc/fstab, is all that it needs.
With --json: {{"cluster", "node", "name", "role", "mountpoint", "state_directory", "listen", "advertise"}}.

{EXIT_CODES_HELP}""")
@click.argument("ticket")
@click.argument("directory", metavar="DIR")
@click.option("--learner", is_flag=True, help="Do not vote: get everything, and count for nothing.")
@node_options
@json_option
@click.pass_obj
def join(settings: Settings, ticket: str, directory: str, learner: bool, node: NodeOptions,
         as_json: bool) -> None:  # fmt: skip
    """Make this host a member of the cluster that TICKET is for, and mount it at DIR.

    `aspen ticket create` on a member makes the ticket; `-` reads it from standard input, where no other user
    of this host sees it. A join that fails leaves nothing behind; one that was killed is ended by the same
    command.
    """
    with failures():
        if ticket == "-":
            ticket = sys.stdin.readline(_LINE_MAX)
        admission = tickets.decode(ticket)
        wanted = Wanted(settings, admission.cluster_name, directory, node, joining=True)
        with _Joining(quiet=as_json) as reporter:
            joined = _become_member(wanted, admission, learner, reporter)
            role = _until_in_step(wanted, joined, learner, reporter)
    name, listen, advertise = wanted.settings
    cluster, mountpoint = joined.identity.name, wanted.options.mountpoint
    if as_json:
        print_json({"cluster": cluster, "node": joined.identity.node_id, "name": name, "role": role,
                    "mountpoint": mountpoint, "state_directory": str(wanted.directory.path), "listen": listen,
                    "advertise": list(advertise)})  # fmt: skip
    else:
        click.echo(f"{cluster} is mounted at {mountpoint}; this host is {name}, a {role}")


def _become_member(wanted: Wanted, ticket: Ticket, learner: bool, reporter: "_Joining") -> Joined:
    """Mounted when it returns, but perhaps far behind."""
    reporter.say(f"asking {ticket.cluster_name} to let this host in")
    with Making(wanted.directory) as making:
        joined = trio.run(_ask, wanted, ticket, learner)
        peer_settings.write(wanted.directory.path, wanted.settings)
        contacts.write(wanted.directory.path, joined.members)
        making.keep()  # a member now: to forget that would leave one behind that never answers
        making.hand_over()
        reporter.say(f"admitted as node {joined.identity.node_id}; mounting")
        try:
            wanted.mount(_Mounting(wanted, reporter))
        except Failure as failure:
            failure.advice = (
                f"this host is a member already: mount -t aspen {joined.identity.name} "
                f"{wanted.options.mountpoint} tries again; to give it up, run aspen member remove "
                f"{joined.identity.node_id} on another member and delete {wanted.directory.path}"
            )
            raise
    return joined


async def _ask(wanted: Wanted, ticket: Ticket, learner: bool) -> Joined:
    """Asks again while the cluster is not able to answer; it knows that it is the same one who asks."""
    end = trio.current_time() + _ASK_S
    while True:
        try:
            return await ask_to_join(ticket, wanted.directory.path, wanted.settings.name,
                                     wanted.settings.advertise, SystemClock(), SystemEntropy(),
                                     promote=not learner)  # fmt: skip
        except _PASSING:
            if trio.current_time() > end:
                raise
        await trio.sleep(PEER_BACKOFF_MS_MAX / 1000)


def _until_in_step(wanted: Wanted, joined: Joined, learner: bool, reporter: "_Joining") -> str:
    """The node's role, when it has what the leader has. Failure when it gets no nearer."""
    told: Any = None
    since = time.monotonic()
    while True:
        try:
            row = _look(wanted, reporter)
        except KeyboardInterrupt:
            click.echo("this host is a member, and mounted; it catches up by itself", err=True)
            sys.exit(EXIT_INTERRUPTED)
        if row is not None and _in_step(row, learner):
            return str(row["role"])
        if row != told:
            told, since = row, time.monotonic()
        if time.monotonic() - since > _PATIENCE_S:
            raise Failure(
                f"this host is a member (node {joined.identity.node_id}) and mounted, but does not catch up",
                advice="it goes on trying by itself: aspen status tells what it is waiting for")  # fmt: skip
        time.sleep(_LOOK_S)


def _in_step(row: Mapping[str, Any], learner: bool) -> bool:
    if learner:
        return bool(row["role"] == "learner" and row["lag"] is not None and row["lag"] <= LEARNER_LAG_MAX)
    return row["role"] in ("voter", "leader")


class _Mounting:
    """Called while the mount waits for its first state: that comes from the leader, which must find the way
    here. Refused when it does not."""

    def __init__(self, wanted: Wanted, reporter: "_Joining") -> None:
        self._wanted, self._reporter = wanted, reporter
        self._since: float | None = None  # it listens
        self._reached = False

    def __call__(self) -> None:
        status = _status(self._wanted)
        if status is None:
            return
        _show(status, self._reporter)
        self._reached = self._reached or bool(status.get("leader") or status.get("snapshot"))
        now = time.monotonic()
        self._since = self._since or now
        if not self._reached and now - self._since > _UNREACHED_S:
            where = " ".join(self._wanted.settings.advertise)
            raise mount.Refused(
                mount.ExitCode.MOUNT_FAILED,
                f"no leader has reached this host in {_UNREACHED_S:g} s: the daemon was stopped. The others "
                f"look for it at {where}; if it is found elsewhere, mount it with -o advertise=HOST:PORT; "
                "else see whether a firewall is in the way, and what aspen status says on another member",
            )


def _status(wanted: Wanted) -> Mapping[str, Any] | None:
    """Of the new node; None while it does not answer yet."""
    try:
        with Client(str(wanted.directory.control_socket), timeout_s=5) as client:
            found: Mapping[str, Any] = client.call("status").result
    except errors.ControlError:
        return None
    return found


def _look(wanted: Wanted, reporter: "_Joining") -> dict[str, Any] | None:
    """What the new node says of itself; None while it does not answer yet."""
    status = _status(wanted)
    return _show(status, reporter) if status is not None else None


def _show(status: Mapping[str, Any], reporter: "_Joining") -> dict[str, Any] | None:
    """The row of the new node."""
    row = next((row for row in status.get("members", ()) if row.get("state") == "here"), None)
    reporter.show(row, status.get("snapshot"))
    return row


class _Joining(Reporter):
    """Tells how far a node is that has become a member."""

    def show(self, row: Mapping[str, Any] | None, snapshot: Mapping[str, Any] | None) -> None:
        if snapshot:
            self.say("fetching the state", snapshot["bytes"], max(snapshot["bytes"], snapshot["bytes_total"]))
        elif row is not None and row["role"] in ("voter", "leader"):
            self.say("promoted")
        elif row is not None and row["lag"] is not None:
            behind = row["lag"]
            if self._bar is not None and behind:
                self.say(f"catching up: {behind:,} entries behind")
            else:
                self.say("catching up")

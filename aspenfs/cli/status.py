"""`aspen status`: is it healthy, and if not, what to do. Answers also when no daemon runs.

Belongs here: what can be told from outside of the daemon (its state directory, its lock, the mount
table, the disk), and the printing of what the daemon tells about itself. What the daemon may send is
described in `docs/design/control-socket.md`.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from aspenfs import errors
from aspenfs.cli.aspen import Settings
from aspenfs.cli.kv import json_option
from aspenfs.cli.lock import holder_pid
from aspenfs.cli.member import print_members
from aspenfs.cli.output import (
    EXIT_CODES_HELP,
    EXIT_REFUSED,
    EXIT_UNREACHABLE,
    failures,
    flush,
    print_json,
    size,
)
from aspenfs.cli.paths import ROOT_STATE_DIR, StateDirectory
from aspenfs.fuse import mounts
from aspenfs.runtime import identity

_FREE_SHARE_MIN = 0.05  # of the disk under the state directory
_TAIL_BYTES = 4096  # of daemon.log, for its last line
# Said already in other words, or meant for programs.
_NOT_SHOWN = ("health", "problems", "metrics", "figures", "members", "events")


class Problem(NamedTuple):
    cause: str
    advice: str


@click.command(epilog=f"""\b
Examples:
  aspen status
  aspen status --json | jq .problems

\b
With --json: {{"running", "healthy", "problems": [{{"cause", "advice"}}], "state_directory", "daemon"}};
"daemon" is what the daemon tells about itself, null if none runs.

{EXIT_CODES_HELP}
Here 1 means: it runs, and there is a problem.
""")
@json_option
@click.pass_obj
def status(settings: Settings, as_json: bool) -> None:
    """Is it healthy, and if not, what to do."""
    directory = settings.directory
    daemon: Mapping[str, Any] | None = None
    with failures():
        try:
            with settings.client() as client:
                daemon = client.call("status").result
        except errors.Unreachable as error:
            problems = [_not_running(directory, str(error))]
        else:
            problems = _problems(directory, daemon)
    if as_json:
        print_json({"running": daemon is not None, "healthy": not problems,
                    "problems": [problem._asdict() for problem in problems],
                    "state_directory": str(directory.path), "daemon": daemon})
    else:
        _show(directory, daemon, problems)
    flush()
    if problems:
        sys.exit(EXIT_REFUSED if daemon is not None else EXIT_UNREACHABLE)


def _problems(directory: StateDirectory, daemon: Mapping[str, Any]) -> list[Problem]:
    """What the daemon complains about, and what it cannot see itself."""
    problems = [Problem(str(one.get("cause")), str(one.get("advice", "")))
                for one in daemon.get("problems", [])]
    if mountpoint := daemon.get("mountpoint"):
        match mounts.probe(mountpoint):
            case mounts.State.ABSENT:
                problems.append(Problem(
                    f"the daemon runs, but {mountpoint} is not its mount any more",
                    f"end it (kill {daemon.get('pid', 'its pid')}) and mount again"))
            case mounts.State.HUNG | mounts.State.STALE:
                problems.append(Problem(
                    f"the mount at {mountpoint} does not answer",
                    f"read {directory.log}; if it stays so: umount -l {mountpoint}, and mount again"))
            case mounts.State.SERVED:
                pass
    disk = os.statvfs(directory.path)
    if disk.f_bavail < disk.f_blocks * _FREE_SHARE_MIN:
        problems.append(Problem(
            f"the disk of {directory.path} is nearly full: {size(disk.f_bavail * disk.f_frsize)} left",
            "free some space there; when it is full, writes get ENOSPC and nothing that was written is lost"))
    return problems


def _not_running(directory: StateDirectory, cause: str) -> Problem:
    """Why no daemon answers, as far as its state directory tells."""
    make = "make one: aspen init NAME MOUNTPOINT; or join a cluster: aspen join TICKET MOUNTPOINT"
    if not directory.path.exists():
        if os.geteuid() != 0 and ROOT_STATE_DIR.exists() and directory.path != ROOT_STATE_DIR:
            return Problem(f"no node of yours: {directory.path} does not exist",
                           f"root's node is in {ROOT_STATE_DIR}: sudo aspen status")
        return Problem(f"no node here yet: {directory.path} does not exist",
                       make)
    pid = holder_pid(directory)
    who = "a daemon" if pid is None else f"the daemon with pid {pid}"
    if _locked(directory.lock):
        return Problem(f"{who} is at work on {directory.path} but does not answer: {cause}",
                       f"it may still be starting: try again; else read {directory.log}, kill it and mount "
                       "again: what was written is kept")
    cluster = identity.read(directory.path)
    if cluster is None:
        return Problem(f"no node here yet: {directory.path} holds no cluster", make)
    start = f"start one: mount -t aspen {cluster.name} MOUNTPOINT"
    if words := _last_error(directory.log):
        return Problem(f"no daemon runs: the last one ended with an error: {words}",
                       f"{directory.log} has more; when that is settled, {start}")
    if pid is not None:
        return Problem(f"no daemon runs: {who} was killed or failed",
                       f"{directory.log} has its last words; {start}: what was written is kept")
    return Problem(f"no daemon runs on {directory.path}", start)


def _last_error(log: Path) -> str:
    """What the daemon that wrote this log ended with; empty if it ended in peace, or was killed."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    _, found, words = lines[-1].partition(" ERROR __main__ ") if lines else ("", "", "")
    return words if found else ""


def _locked(path: Path) -> bool:
    """Whether a daemon holds the lock, from the kernel's table: to try it could hinder one that starts."""
    try:
        inode = f":{path.stat().st_ino}"  # no device: some file systems show another one there than in stat
    except FileNotFoundError:
        return False
    return any("FLOCK" in line and any(word.endswith(inode) for word in line.split())
               for line in Path("/proc/locks").read_text().splitlines())


def _show(directory: StateDirectory, daemon: Mapping[str, Any] | None, problems: Sequence[Problem]) -> None:
    if daemon is None:
        click.echo("not running")
    else:
        click.echo("healthy" if not problems else "not healthy")
    for cause, advice in problems:
        click.echo(f"  ! {cause}")
        if advice:
            click.echo(f"    {advice}")
    told = daemon or {"state_directory": str(directory.path)}
    rows = {name: value for name, value in told.items() if name not in _NOT_SHOWN} | told.get("figures", {})
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        click.echo(f"  {name.replace('_', ' '):{width}}  {_text(name, value)}")
    if told.get("members"):
        click.echo()
        print_members(told["members"], indent="  ")


def _text(name: str, value: Any) -> str:
    if name.endswith("bytes") and type(value) is int:
        return size(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return " ".join(str(item) for item in value.values())
    if isinstance(value, list):
        return ", ".join(_text(name, item) for item in value) or "-"
    return "-" if value is None else str(value)

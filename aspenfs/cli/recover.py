"""`aspen recover --force-new-cluster`: what one node has becomes a new cluster, when the old one is lost."""

import os
import sys
from pathlib import Path

import click

from aspenfs import errors
from aspenfs.cli.aspen import Settings
from aspenfs.cli.kv import json_option
from aspenfs.cli.lock import StateLock
from aspenfs.cli.output import EXIT_CODES_HELP, EXIT_REFUSED, Failure, failures, print_json
from aspenfs.cli.paths import state_directory
from aspenfs.cli.reporter import Reporter
from aspenfs.runtime.backup.recovering import Found, Recovered, force_new_cluster, inspect
from aspenfs.runtime.system import SystemClock, SystemEntropy

_WARNING = """\
{path} holds node {node} of the cluster {name}.
  Its log ends with entry {last_index} of term {last_term}; {applied_index} are applied.
  Other members: {others}

This makes a NEW cluster of what this node has. Before you say yes:

  1. Only if a majority of the members is lost for good. Nodes that can be started again bring the cluster
     back by themselves, with everything.
  2. What was acknowledged to someone, and is not in this log, is lost. If several nodes are left, run this
     without --yes on each, and recover the one with the greatest term, then the greatest entry.
  3. What is in this log and was never acknowledged becomes part of it.
  4. The old members must never run again under this name: their clients would write into a dead cluster.
     (They cannot join this one: it has another id, other keys, another CA.) Empty their state directories,
     and let them join anew with tickets.
  5. Chunks of files that only the lost nodes had are gone. How many will be told.

A copy of the state directory made now costs nothing but space:  cp -a {path} {path}.before

Then:  aspen recover --force-new-cluster --yes{state_dir}
"""


@click.command(epilog=f"""\b
Examples:
  aspen recover --force-new-cluster            look: what this node has, and what it would mean
  aspen recover --force-new-cluster --yes      do it

\b
With --json: {{"cluster", "node", "applied", "last_index", "last_term", "others"}}, and with --yes
{{"cluster", "cluster_id", "node", "revision", "missing_chunks"}}.

{EXIT_CODES_HELP}
Here 1 also means: nothing was done, for want of --yes.
""")
@click.option("--force-new-cluster", is_flag=True, help="Make a new cluster of what this node has.")
@click.option("--yes", is_flag=True, help="I have read what that means.")
@click.option("--state-dir", "own_state_dir", metavar="DIR", help="Of the node, as aspen --state-dir.")
@json_option
@click.pass_obj
def recover(settings: Settings, force_new_cluster: bool, yes: bool, own_state_dir: str | None,
            as_json: bool) -> None:  # fmt: skip
    """Go on without a majority: offline, on one node, when the others are lost for good."""
    if not force_new_cluster:
        raise click.UsageError("there is one way to recover so far: --force-new-cluster")
    with failures(), Reporter(quiet=as_json) as reporter:
        directory = settings.directory
        if own_state_dir:
            directory = state_directory(os.environ, os.geteuid(), os.path.abspath(own_state_dir))
        path = directory.path
        if not path.is_dir():
            raise Failure(f"no node here: {path} does not exist", advice="name another with --state-dir")
        try:
            lock = StateLock.acquire(directory)
        except errors.Busy as error:
            raise Failure(str(error), advice="a node that runs is not recovered: unmount it first") from error
        with lock:
            if not yes:
                found = inspect(path)
            else:
                made = _force(path, reporter)
    if yes:
        _tell(made, path, as_json)
    else:
        _warn(found, path, own_state_dir, as_json)
        sys.exit(EXIT_REFUSED)


def _force(path: Path, reporter: Reporter) -> Recovered:
    return force_new_cluster(path, SystemClock(), SystemEntropy(), reporter.say)


def _warn(found: Found, path: Path, own_state_dir: str | None, as_json: bool) -> None:
    if as_json:
        print_json({"cluster": found.node.name, "node": found.node.node_id, "applied": found.applied_index,
                    "last_index": found.last_index, "last_term": found.last_term,
                    "others": list(found.others)})  # fmt: skip
        return
    click.echo(_WARNING.format(
        path=path, node=found.node.node_id, name=found.node.name, last_index=found.last_index,
        last_term=found.last_term, applied_index=found.applied_index,
        others=", ".join(found.others) or "none that it knows of",
        state_dir=f" --state-dir {own_state_dir}" if own_state_dir else ""), nl=False)  # fmt: skip


def _tell(made: Recovered, path: Path, as_json: bool) -> None:
    name = made.node.name
    if as_json:
        print_json({"cluster": name, "cluster_id": made.node.cluster_id.hex(), "node": made.node.node_id,
                    "revision": made.index, "missing_chunks": made.missing_blobs})  # fmt: skip
        return
    click.echo(f"{path} holds the new cluster {name}, of this node alone; revision {made.index}")
    click.echo(f"  mount it:    mount -t aspen -o state_dir={path} {name} MOUNTPOINT")
    click.echo("  more nodes:  aspen ticket create, once it is mounted; old members must be emptied before")
    if made.missing_blobs:
        click.echo(f"LOST: {made.missing_blobs} chunks of files were on other nodes only; where they belong, "
                   "reads fail. aspen check names the files", err=True)  # fmt: skip

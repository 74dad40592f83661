"""`aspen restore`: a backup becomes a new cluster of one node, in an empty state directory."""

import os
import sys
from pathlib import Path

import click

from aspenfs import errors
from aspenfs.cli.aspen import Settings
from aspenfs.cli.backup import described, opened, reported, tell_lost
from aspenfs.cli.founding import Making
from aspenfs.cli.kv import json_option
from aspenfs.cli.output import EXIT_CODES_HELP, EXIT_REFUSED, Failure, failures, print_json, size
from aspenfs.cli.paths import StateDirectory, state_directory
from aspenfs.cli.reporter import Reporter
from aspenfs.runtime.backup.restoring import Restored
from aspenfs.runtime.backup.restoring import restore as restore_from
from aspenfs.runtime.system import SystemClock, SystemEntropy


@click.command(epilog=f"""\b
Examples:
  aspen restore /srv/backups/demo-2026-11-25.aspen --state-dir /var/lib/aspenfs
  ssh vault 'zstd -dc demo.aspen.zst' | aspen restore - --name demo2

\b
The new cluster has an id, keys and a CA of its own, and this host as its only member: nodes of the old one
cannot meet it by mistake. Revisions go on behind the backup's. Every byte is verified on the way; after an
error the directory is as empty as it was.
With --json: {{"state_directory", "cluster", "cluster_id", "node", "revision", "backup"}}; "backup" as
aspen backup --json has it.

{EXIT_CODES_HELP}""")
@click.argument("file", metavar="FILE")
@click.option("--state-dir", "own_state_dir", metavar="DIR", help="Where the new node keeps its state, as "
              "aspen --state-dir; missing, or empty.")
@click.option("--name", metavar="NAME", help="What the new cluster is called.  [default: as in the backup]")
@json_option
@click.pass_obj
def restore(settings: Settings, file: str, own_state_dir: str | None, name: str | None,
            as_json: bool) -> None:  # fmt: skip
    """Make a new cluster of the backup in FILE (- is stdin)."""
    with failures(), Reporter(quiet=as_json) as reporter:
        directory = settings.directory
        if own_state_dir:
            directory = state_directory(os.environ, os.geteuid(), os.path.abspath(own_state_dir))
        made = _restore(file, directory, name, reporter)
    if as_json:
        print_json({"state_directory": str(directory.path), "cluster": made.node.name,
                    "cluster_id": made.node.cluster_id.hex(), "node": made.node.node_id,
                    "revision": made.index,
                    "backup": described(made.header, made.end, made.lost)})  # fmt: skip
    else:
        _tell(made, directory.path)
    if made.lost:
        sys.exit(EXIT_REFUSED)


def _restore(file: str, directory: StateDirectory, name: str | None, reporter: Reporter) -> Restored:
    with opened(file) as source:
        try:
            making = Making(directory)
        except errors.Busy as error:
            raise Failure(str(error), advice="restore it into a directory that nobody uses") from error
        with making:
            reporter.say("reading")
            made = restore_from(source, file, directory.path, name=name, clock=SystemClock(),
                                entropy=SystemEntropy(), progress=reported(reporter))  # fmt: skip
            making.keep()
    return made


def _tell(made: Restored, path: Path) -> None:
    end, name = made.end, made.node.name
    click.echo(f"{path} holds the new cluster {name}: {end.rows:,} rows, {end.blobs:,} chunks, "
               f"{size(end.row_bytes + end.blob_bytes)}, revision {made.index}")  # fmt: skip
    click.echo(f"  mount it:    mount -t aspen -o state_dir={path} {name} MOUNTPOINT")
    click.echo("  more nodes:  aspen ticket create, once it is mounted; each begins with an empty directory")
    click.echo("  old nodes belong to the old cluster: do not mount them any more under this name")
    tell_lost(made.lost)

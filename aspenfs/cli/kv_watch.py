"""`aspen kv watch`: changes as they happen."""

from collections.abc import Sequence
from typing import Any

import click

from aspenfs.cli.aspen import Settings
from aspenfs.cli.client import Event
from aspenfs.cli.completion import Key
from aspenfs.cli.kv import base64_option, json_option, key_bytes, record_json
from aspenfs.cli.output import Failure, failures, flush, json_bytes, print_bytes, print_json, shown
from aspenfs.errors import Compacted
from aspenfs.kv.types import prefix_end

_VALUE_SHOWN_MAX = 200  # characters, on a line for people


@click.command(epilog="""\b
Examples:
  aspen kv watch app/
  aspen kv watch --exact app/db/host
  aspen kv watch --json app/ | jq -r 'select(.type == "put") | .key'
  aspen kv watch --from-revision 1207 app/       replays what came after, then goes on

\b
Lines:  REVISION put KEY VALUE        (long or binary values are cut or escaped here; not with --json)
        REVISION delete KEY
With --json: {"type": "put", "revision", "key", "value", ...}, {"type": "delete", ...}, and once at the
start {"type": "watching", "after_revision"}: from there on nothing is missed.
""")
@click.argument("prefix", required=False, default="", type=Key())
@click.option("--exact", is_flag=True, help="PREFIX is one key, not the beginning of keys.")
@click.option("--from-revision", type=click.IntRange(min=0), default=0,
              help="Begin with what changed at this revision.")
@json_option
@base64_option
@click.pass_obj
def watch(settings: Settings, prefix: str, exact: bool, from_revision: int, as_json: bool,
          key_base64: bool) -> None:
    """Print each change of the keys that begin with PREFIX, until interrupted.

    Changes come in order, once they are committed, and none is left out: when the daemon restarts,
    the watch waits for it and goes on where it was.
    """
    start = key_bytes(prefix, key_base64)
    if exact and not start:
        raise click.UsageError("--exact needs a key.")
    end = start + b"\0" if exact else prefix_end(start)

    def lost() -> None:
        click.echo("aspen: the daemon went away; waiting for it (Ctrl-C ends)", err=True)

    seen = from_revision - 1
    with failures(), settings.client(on_lost=lost) as client:
        try:
            for revision, events in client.watch(start, end, from_revision=from_revision):
                if as_json:
                    _print_json(revision, events)
                elif not events:
                    click.echo(f"aspen: watching from revision {revision + 1} on", err=True)
                else:
                    _print_lines(revision, events)
                seen = revision
                flush()
        except Compacted as error:
            raise Failure(f"what changed after revision {max(seen, 0)} is compacted; "
                          f"the oldest revision left is {error.oldest}",
                          advice="list the keys (`aspen kv ls`) and watch anew: changes were missed",
                          name="Compacted") from None


def _print_lines(revision: int, events: Sequence[Event]) -> None:
    for key, record in events:
        if record is None:
            line = f"{revision} delete {shown(key)}\n"
        else:
            line = f"{revision} put {shown(key)} {shown(record.value or b'', limit=_VALUE_SHOWN_MAX)}\n"
        print_bytes([line.encode()])


def _print_json(revision: int, events: Sequence[Event]) -> None:
    if not events:
        print_json({"type": "watching", "after_revision": revision})
    for key, record in events:
        body: dict[str, Any] = {"type": "delete" if record is None else "put", "revision": revision}
        print_json(body | (json_bytes("key", key) if record is None else record_json(record)))

"""`aspen member`: who belongs to the cluster, and changing that."""

import os
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click
from click.shell_completion import CompletionItem

from aspenfs.cli.aspen import Settings
from aspenfs.cli.kv import json_option
from aspenfs.cli.output import EXIT_CODES_HELP, failures, flush, print_json, span, utc
from aspenfs.cli.table import print_table

_HEAD = ("NAME", "ID", "ROLE", "STATE", "LAG", "TOPOLOGY", "ADDRESS")


class MemberName(click.ParamType[str]):
    """A member by name or id; completes names, and ids where a name is not unique."""

    name = "member"

    def shell_complete(self, ctx: click.Context, param: click.Parameter,
                       incomplete: str) -> list[CompletionItem]:  # fmt: skip
        from aspenfs.cli.client import Client
        from aspenfs.cli.paths import state_directory
        from aspenfs.errors import AspenError

        try:
            path = state_directory(os.environ, os.geteuid(), ctx.find_root().params.get("state_dir"))
            with Client(str(path.control_socket), timeout_s=2) as client:
                rows = client.call("member.list").result["members"]
        except AspenError:
            return []  # no daemon: nothing to offer, and no place to say why
        names = [str(row["name"]) for row in rows]
        words = {row["name"] if names.count(row["name"]) == 1 else str(row["id"]): row for row in rows}
        return [CompletionItem(word, help=str(row["role"])) for word, row in words.items()
                if word.startswith(incomplete)]  # fmt: skip


@click.group(epilog="""\b
Try:
  aspen member list
  aspen member remove db3        it is lost for good, or no longer wanted
  aspen ticket create            to have another host join
""")
def member() -> None:
    """Who belongs to the cluster. Each mount is a member.

    Voters decide: a majority of them must have what is written. Learners get everything and count for
    nothing; every new node begins as one, and becomes a voter by itself when it has caught up.
    """


@member.command("list", epilog=f"""\b
ROLE   leader, voter, learner; none: its row is there, the cluster does not count on it (yet)
STATE  here: the node that answers; connected and unreachable as that node sees it
LAG    entries of the log that it lacks of what the leader has
TOPOLOGY  its version of where it is found: the start of it, counted, since which it is found at ADDRESS

\b
With --json: [{{"name", "id", "role", "state", "lag", "addresses", "topology", "since", "cause"}}].

{EXIT_CODES_HELP}""")
@click.option("--removed", is_flag=True, help="Those too that were removed.")
@json_option
@click.pass_obj
def list_(settings: Settings, removed: bool, as_json: bool) -> None:
    """List the members."""
    with failures(), settings.client() as client:
        found = client.call("member.list", removed=removed).result["members"]
    rows = [for_readers(row) for row in found]
    if as_json:
        print_json(rows)
    else:
        print_members(rows)
    flush()


def for_readers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `cluster_view.member_rows` as it is shown; it may be of a daemon of an older release."""
    since_ns = row["since_ns"]
    told = {name: row[name] for name in ("name", "id", "role", "state", "lag")}
    since = utc(since_ns) if since_ns else None
    return {**told, "addresses": list(row["addresses"]), "topology": row.get("topology"), "since": since,
            "cause": row["cause"]}  # fmt: skip


def print_members(rows: Sequence[Mapping[str, Any]], *, indent: str = "") -> None:
    table = [(str(row["name"]), str(row["id"]), str(row["role"]), _state(row),
              "-" if row["lag"] is None else f"{row['lag']:,}", str(row.get("topology") or "-"),
              " ".join(row["addresses"]) or "-")
             for row in rows]  # fmt: skip
    print_table(_HEAD, table, indent=indent)


def _state(row: Mapping[str, Any]) -> str:
    if row["state"] != "unreachable" or not row["since"]:
        return str(row["state"])
    seconds = max(0, int(time.time() - datetime.fromisoformat(row["since"]).timestamp()))
    return f"unreachable for {span(seconds)}"


_WHICH = click.argument("which", metavar="ID|NAME", type=MemberName())


@member.command(epilog=EXIT_CODES_HELP)
@_WHICH
@json_option
@click.pass_obj
def promote(settings: Settings, which: str, as_json: bool) -> None:
    """Make a learner that has caught up a voter."""
    _change(settings, "promote", which, as_json)


@member.command(epilog=EXIT_CODES_HELP)
@_WHICH
@json_option
@click.pass_obj
def demote(settings: Settings, which: str, as_json: bool) -> None:
    """Make a voter a learner: it goes on getting everything, but nobody waits for it."""
    _change(settings, "demote", which, as_json)


@member.command(epilog=f"""\b
Examples:
  aspen member remove db3
  aspen member remove 4611686018427387

\b
Removing needs a majority of the voters that are left in and those that were there. The files in the removed
node's state directory stay; to make that host a member again, empty it and join with a new ticket.

{EXIT_CODES_HELP}""")
@_WHICH
@json_option
@click.pass_obj
def remove(settings: Settings, which: str, as_json: bool) -> None:
    """Remove a member for ever: every other node refuses it from now on."""
    _change(settings, "remove", which, as_json)


def _change(settings: Settings, act: str, which: str, as_json: bool) -> None:
    with failures(), settings.client() as client:
        done = client.call("member.change", act=act, member=which).result
    if as_json:
        print_json(done)
    else:
        what = "is removed" if act == "remove" else f"is a {done['role']} now"
        click.echo(f"{done['name']} (node {done['node']}) {what}")

"""`aspen ticket`: what lets one new node into the cluster."""

import shlex
import time

import click

from aspenfs.cli.aspen import Settings
from aspenfs.cli.client import Client
from aspenfs.cli.kv import json_option
from aspenfs.cli.kv_lease import Ttl
from aspenfs.cli.output import EXIT_CODES_HELP, failures, flush, local_time, print_json, span, utc
from aspenfs.cli.table import print_table

_TTL_MS = 15 * 60_000
_MS_PER_S, _NS_PER_S = 1_000, 1_000_000_000


@click.group(epilog="""\b
Try:
  aspen ticket create            prints the line to run on the new host
  aspen ticket create --ttl 1d --learner
  aspen ticket list
""")
def ticket() -> None:
    """What lets one new node into the cluster, once and for a short time.

    Whoever has a ticket can join, so hand it on as you would a password. The cluster keeps only a hash.
    """


@ticket.command(epilog=f"""\b
Examples:
  aspen ticket create
  aspen ticket create --ttl 2h --learner
  ssh db2 aspen join "$(aspen ticket create --quiet)" /mnt/aspen

\b
A node that `tools/up` or `mount -o create` has made has no network until it makes its first ticket. Then
it gets the cluster's certificate authority, and listens: on every interface, port 7420, unless --listen
says otherwise.
With --json: {{"ticket", "id", "expires", "command", "learner", "began", "listen", "advertise"}}.

{EXIT_CODES_HELP}""")  # fmt: skip
@click.option("--ttl", type=Ttl(), default="15m", show_default=True,
              help="How long it is good: 90s, 15m, 2h, 7d.")
@click.option("--learner", is_flag=True, help="The node shall not vote: it gets all, and counts for nothing.")
@click.option("--listen", metavar="HOST:PORT", help="Of a node without a network: where others connect to.")
@click.option("--advertise", metavar="HOST:PORT", multiple=True, help="So too: where they find it.")
@click.option("-q", "--quiet", is_flag=True, help="Print the ticket alone.")
@json_option
@click.pass_obj
def create(settings: Settings, ttl: int, learner: bool, listen: str | None, advertise: tuple[str, ...],
           quiet: bool, as_json: bool) -> None:  # fmt: skip
    """Make a ticket, and print the `aspen join` line to run on the new host."""
    ttl_s = max(1, ttl // _MS_PER_S)
    wanted = {"ttl_s": ttl_s, "listen": listen or "", "advertise": list(advertise)}
    with failures(), settings.client() as client:
        made = client.call("ticket.create", **wanted).result
    command = ["aspen", "join", made["ticket"], "/mnt/aspen", *(["--learner"] if learner else [])]
    if as_json:
        print_json({"ticket": made["ticket"], "id": made["id"], "expires": utc(made["expires_ns"]),
                    "command": command, "learner": learner, "began": made["began"],
                    "listen": made["listen"], "advertise": list(made["advertise"])})  # fmt: skip
    elif quiet:
        click.echo(made["ticket"])
    else:
        if made["began"]:
            click.echo(f"this node listens on {made['listen']} from now on, and is found at "
                       f"{', '.join(made['advertise'])}")  # fmt: skip
        until = local_time(made["expires_ns"])
        click.echo(f"ticket {made['id']}, good for one node until {until}; on the new host run:")
        click.echo(f"  {shlex.join(command)}")
    flush()


@ticket.command("list", epilog=EXIT_CODES_HELP)
@json_option
@click.pass_obj
def list_(settings: Settings, as_json: bool) -> None:
    """List the tickets that are open, and those used or expired of late."""
    with failures(), settings.client() as client:
        found = client.call("ticket.list").items
    if as_json:
        print_json([
            {"id": one["id"], "state": one["state"], "created": utc(one["created_ns"]),
             "expires": utc(one["expires_ns"]), "node": one["node"] or None}
            for one in found
        ])  # fmt: skip
    else:
        rows = [(one["id"], one["state"], _when(one["expires_ns"]), str(one["node"] or "-")) for one in found]
        empty = "no tickets: aspen ticket create makes one"
        print_table(("ID", "STATE", "EXPIRES", "USED BY NODE"), rows, empty=empty)
    flush()


def _when(time_ns: int) -> str:
    left_s = (time_ns - time.time_ns()) // _NS_PER_S
    return local_time(time_ns) + (f" (in {span(left_s)})" if left_s > 0 else "")


@ticket.command(epilog=EXIT_CODES_HELP)
@click.argument("which", metavar="ID|TICKET")
@json_option
@click.pass_obj
def revoke(settings: Settings, which: str, as_json: bool) -> None:
    """Withdraw a ticket: nobody can join with it any more. A node that has joined stays a member."""
    with failures(), settings.client() as client:
        done = _revoke(client, which)
    if as_json:
        print_json({"id": done})
    else:
        click.echo(f"ticket {done} is withdrawn")


def _revoke(client: Client, which: str) -> str:
    withdrawn: str = client.call("ticket.revoke", ticket=which).result["id"]
    return withdrawn

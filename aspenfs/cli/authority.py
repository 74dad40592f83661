"""`aspen ca`: the cluster's certificate authority."""

import click

from aspenfs.cli.aspen import Settings
from aspenfs.cli.kv import json_option
from aspenfs.cli.output import EXIT_CODES_HELP, failures, local_time, print_json, utc

_PATIENCE_S = 86_400.0  # it waits for members that are down; Ctrl-C and calling it again do no harm


@click.group()
def ca() -> None:
    """The cluster's own certificate authority, by which its nodes know each other.

    Certificates of nodes are good for a year, and renewed by themselves long before that.
    """


@ca.command(epilog=f"""\b
Do so when a voter's disk may have been read by others, or its key is old. Run it on a voter. It may be
interrupted at any point and run again: it goes on where it was.
Tickets that were made before are of no use afterwards.

{EXIT_CODES_HELP}""")
@json_option
@click.pass_obj
def rotate(settings: Settings, as_json: bool) -> None:
    """Replace the CA's key and all certificates, while everything goes on.

    Waits until every member trusts the new CA, then until every one has a certificate of it: a member that
    is down holds it up. `aspen member remove` those that will not come back.
    """
    with failures(), settings.client() as client:
        client.timeout_s = max(client.timeout_s, _PATIENCE_S)
        result = client.follow("ca.rotate", _ignore if as_json else click.echo)
    if as_json:
        print_json({"expires": utc(result["expires_ns"])})
    else:
        click.echo(f"this node's certificate is good until {local_time(result['expires_ns'])}")


def _ignore(line: object) -> None:
    """With --json only the result counts."""

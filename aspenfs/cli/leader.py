"""`aspen leader`: handing leadership over."""

import click

from aspenfs.cli.aspen import Settings
from aspenfs.cli.kv import json_option
from aspenfs.cli.member import MemberName
from aspenfs.cli.output import EXIT_CODES_HELP, failures, print_json


@click.group()
def leader() -> None:
    """Who leads. The voters elect another one by themselves when the leader is gone."""


@leader.command(epilog=f"""\b
Examples:
  aspen leader transfer          before maintenance of the host that leads
  aspen leader transfer db2

{EXIT_CODES_HELP}""")
@click.argument("which", metavar="[ID|NAME]", type=MemberName(), required=False, default="")
@json_option
@click.pass_obj
def transfer(settings: Settings, which: str, as_json: bool) -> None:
    """Hand leadership over to a voter; without a name, to the one that is most up to date.

    Nothing is lost and nothing fails: writes wait for a moment.
    """
    with failures(), settings.client() as client:
        done = client.call("leader.transfer", member=which).result
    if as_json:
        print_json(done)
    else:
        click.echo(f"{done['name']} (node {done['node']}) leads now")

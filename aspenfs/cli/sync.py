"""`aspen sync`: what syncfs(2) would do, if the kernel passed it on to a FUSE file system."""

import click

from aspenfs.cli.aspen import Settings
from aspenfs.cli.kv import json_option
from aspenfs.cli.output import EXIT_CODES_HELP, failures, print_json


@click.command(epilog=f"""\b
Example:
  cp -a photos /mnt/aspen/files/ && aspen sync

{EXIT_CODES_HELP}""")
@json_option
@click.pass_obj
def sync(settings: Settings, as_json: bool) -> None:
    """Wait until everything written so far survives a loss of power.

    The kernel answers sync(1) and syncfs(2) on a FUSE mount without asking its daemon; this asks it.
    """
    with failures(), settings.client() as client:
        revision = client.call("sync").result
    if as_json:
        print_json({"revision": revision})

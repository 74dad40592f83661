"""`aspen init`: a new cluster of one node, mounted, that others can join."""

import click

from aspenfs.cli.aspen import Settings
from aspenfs.cli.founding import Making, NodeOptions, Wanted, node_options
from aspenfs.cli.kv import json_option
from aspenfs.cli.output import EXIT_CODES_HELP, failures, print_json
from aspenfs.runtime import identity, peer_settings
from aspenfs.runtime.peers import credentials
from aspenfs.runtime.system import SystemClock, SystemEntropy


@click.command(epilog=f"""\b
Examples:
  aspen init demo /mnt/aspen
  aspen init demo /mnt/aspen --listen 192.0.2.7:7420
  aspen init demo /mnt/aspen --advertise db1.example.net --advertise 192.0.2.7

\b
Then, for each further host:
  aspen ticket create          here: it prints the line to run there

\b
At the next boot `mount -t aspen NAME DIR`, or a line in /etc/fstab, is all that it needs.
With --json: {{"cluster", "cluster_id", "node", "name", "mountpoint", "state_directory", "listen",
"advertise"}}.

{EXIT_CODES_HELP}""")
@click.argument("cluster", metavar="NAME")
@click.argument("directory", metavar="DIR")
@node_options
@json_option
@click.pass_obj
def init(settings: Settings, cluster: str, directory: str, node: NodeOptions, as_json: bool) -> None:
    """Make the cluster NAME, with this host as its first node, and mount it at DIR.

    The cluster gets a certificate authority of its own, by which its nodes know each other. One node
    is a cluster already: what is written is on this disk, and others can join at any time.
    """
    with failures():
        wanted = Wanted(settings, cluster, directory, node)
        with Making(wanted.directory) as making:
            made = identity.create(wanted.directory.path, wanted.options.name, SystemEntropy())
            credentials.establish(wanted.directory.path, SystemClock(), SystemEntropy())
            peer_settings.write(wanted.directory.path, wanted.settings)
            making.hand_over()
            wanted.mount()
    name, listen, advertise = wanted.settings
    if as_json:
        print_json({"cluster": made.name, "cluster_id": made.cluster_id.hex(), "node": made.node_id,
                    "name": name, "mountpoint": wanted.options.mountpoint,
                    "state_directory": str(wanted.directory.path), "listen": listen,
                    "advertise": list(advertise)})  # fmt: skip
        return
    click.echo(f"{made.name} is mounted at {wanted.options.mountpoint}; this host is its only node, {name}")
    click.echo(f"  listens on {listen}, is found at {', '.join(advertise)}; state in {wanted.directory.path}")
    click.echo("  more nodes: aspen ticket create")

"""The `aspen` command: its groups, its global options, and nothing that is slow to import.

Belongs here: the table of commands. Each is imported when it is called, so that `aspen kv get` pays
for nothing but itself.
"""

import importlib
import os
import signal
from typing import Any

import click

from aspenfs.cli.client import TIMEOUT_SECONDS, Client
from aspenfs.cli.output import EXIT_CODES_HELP, failures
from aspenfs.cli.paths import StateDirectory, state_directory

# name -> (module, attribute, what `aspen --help` says); a new command is one line here
COMMANDS: dict[str, tuple[str, str, str]] = {
    "backup": ("aspenfs.cli.backup", "backup", "Write the whole cluster into a file; verify one."),
    "ca": ("aspenfs.cli.authority", "ca", "The cluster's certificate authority: rotate."),
    "check": ("aspenfs.cli.check", "check", "Verify every row and every byte; repair offline."),
    "completion": ("aspenfs.cli.completion", "completion", "Print the completion script of a shell."),
    "init": ("aspenfs.cli.init", "init", "Make a new cluster of one node, and mount it."),
    "join": ("aspenfs.cli.join", "join", "Make this host a member of a cluster, and mount it."),
    "kv": ("aspenfs.cli.kv", "kv", "Keys: get, put, delete, cas, ls, txn, watch, lease."),
    "leader": ("aspenfs.cli.leader", "leader", "Who leads: transfer."),
    "member": ("aspenfs.cli.member", "member", "Who belongs to it: list, promote, demote, remove."),
    "recover": ("aspenfs.cli.recover", "recover", "Go on without a majority, as a new cluster."),
    "restore": ("aspenfs.cli.restore", "restore", "Make a new cluster of a backup."),
    "sync": ("aspenfs.cli.sync", "sync", "Wait until everything written survives a loss of power."),
    "status": ("aspenfs.cli.status", "status", "Is it healthy, and if not, what to do."),
    "ticket": ("aspenfs.cli.ticket", "ticket", "What lets a new node in: create, list, revoke."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called; the table holds their short help."""

    def __init__(self, *args: Any, table: dict[str, tuple[str, str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        module, attribute, _ = self.table[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.table[name][2]) for name in self.list_commands(ctx)])


class Settings:
    """What the global options say; the `obj` of every command's context."""

    def __init__(self, state_dir: str | None, timeout_s: float) -> None:
        self._state_dir, self.timeout_s = state_dir, timeout_s

    @property
    def directory(self) -> StateDirectory:
        with failures():
            return state_directory(os.environ, os.geteuid(), self._state_dir)

    def client(self, **options: Any) -> Client:
        return Client(str(self.directory.control_socket), timeout_s=self.timeout_s, **options)


def _release(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
    if asked:
        from importlib import metadata

        try:
            release = metadata.version("aspenfs")
        except metadata.PackageNotFoundError:
            release = "(not installed)"
        click.echo(f"aspen {release}")
        ctx.exit()


_EPILOG = f"""\b
Try:
  aspen init demo /mnt/aspen          a new cluster, on this host
  aspen ticket create                 prints what to run on the next one
  aspen status
  aspen kv put app/db/host db1.example.net
  aspen kv get app/db/host
  aspen kv --help

\b
Shell completion, also of keys (bash; zsh and fish alike):
  aspen completion bash > /etc/bash_completion.d/aspen

{EXIT_CODES_HELP}"""


@click.group(cls=LazyGroup, table=COMMANDS, epilog=_EPILOG,
             context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--state-dir", metavar="DIR", envvar="ASPEN_STATE_DIR",
              help="Where the node keeps its state. Default: $ASPEN_STATE_DIR, else /var/lib/aspenfs for "
                   "root, else ~/.local/state/aspenfs.")
@click.option("--timeout", "timeout_s", metavar="SECONDS", type=click.FloatRange(min=0, min_open=True),
              default=TIMEOUT_SECONDS, show_default=True, help="How long to wait for the daemon's answer.")
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_release,
              help="Show the version and end.")
@click.pass_context
def aspen(ctx: click.Context, state_dir: str | None, timeout_s: float) -> None:
    """Talks to the aspenfs daemon of this host: its keys, its health.

    It finds the daemon by its state directory. Everything it writes is on disk when it returns.
    """
    ctx.obj = Settings(state_dir or None, timeout_s)


def main() -> None:
    """Entry point. Ends by SIGPIPE like any other tool when the reader of its output is gone."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    aspen(prog_name="aspen")

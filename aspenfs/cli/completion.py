"""`aspen completion SHELL`: the script that makes a shell complete aspen's commands, options and keys."""

import click
from click.shell_completion import CompletionItem, get_completion_class

from aspenfs.cli.output import shown

_KEYS_MAX = 1_000  # read for one completion: a shell shows no more to a person


@click.command(epilog="""\b
Install it:
  bash   aspen completion bash > /etc/bash_completion.d/aspen
  zsh    aspen completion zsh > "${fpath[1]}/_aspen"
  fish   aspen completion fish > ~/.config/fish/completions/aspen.fish
or, for this shell only:  source <(aspen completion bash)
""")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL. Keys are completed too, one path component at a time."""
    from aspenfs.cli.aspen import aspen

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(aspen, {}, "aspen", "_ASPEN_COMPLETE").source())


class Key(click.ParamType[str]):
    """A key or a prefix on the command line; completes up to the next "/" of the keys that there are."""

    name = "key"

    def shell_complete(self, ctx: click.Context, param: click.Parameter,
                       incomplete: str) -> list[CompletionItem]:
        import os

        from aspenfs.cli.client import Client
        from aspenfs.cli.paths import state_directory
        from aspenfs.errors import AspenError
        from aspenfs.kv.types import prefix_end

        typed = os.fsencode(incomplete)
        found: dict[str, None] = {}
        try:
            path = state_directory(os.environ, os.geteuid(), ctx.find_root().params.get("state_dir"))
            with Client(str(path.control_socket), timeout_s=2) as client:
                for record in client.range(typed, prefix_end(typed), limit=_KEYS_MAX, keys_only=True):
                    head, slash, _ = record.key[len(typed):].partition(b"/")
                    key = typed + head + slash
                    if shown(key) == key.decode("utf-8", "replace"):  # what a shell can type
                        found[shown(key)] = None
        except AspenError:
            return []  # no daemon: nothing to offer, and no place to say why
        return [CompletionItem(key) for key in found]

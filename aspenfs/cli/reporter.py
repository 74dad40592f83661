"""How far a long command is, told on stderr: a bar on a terminal, else a line for each phase.

Stdout is for what the command is asked for.
"""

import sys
from collections.abc import Callable
from typing import Self

import click


class Reporter:
    """A context manager; `quiet` tells nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._phase = ""
        self._bar: Callable[[str, float, float | None], None] | None = None
        self._close: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            self._open_bar()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        task = progress.add_task("", total=None)
        progress.start()
        self._close = progress.stop

        def update(text: str, done: float, total: float | None) -> None:
            progress.update(task, description=text, completed=done, total=total)

        self._bar = update

    def say(self, text: str, done: float = 0, total: float | None = None, detail: str = "") -> None:
        """A phase: of several steps towards `total`, if that is known; `detail` changes meanwhile."""
        if self._bar is not None:
            self._bar(f"{text} {detail}" if detail else text, done, total)
        elif not self._quiet and text != self._phase:
            click.echo(text, err=True)
        self._phase = text

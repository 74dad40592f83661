"""Rows under their names, as wide as they need to be."""

from collections.abc import Sequence

import click

Row = Sequence[str]


def print_table(head: Row, rows: Sequence[Row], *, empty: str = "", indent: str = "") -> None:
    """`empty` is printed in place of a table without rows."""
    if not rows:
        if empty:
            click.echo(indent + empty)
        return
    for line in aligned([head, *rows]):
        click.echo(indent + line)


def aligned(rows: Sequence[Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return [line.rstrip() for line in lines]

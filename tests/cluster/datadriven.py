"""Case files of etcd's `datadriven`: commands, their input, the output expected.

Syntax: tests/vectors/etcd-raft/README.md.

Belongs here: reading them. What a command does is the test's.
"""

import re
from pathlib import Path
from typing import NamedTuple

VECTORS = Path(__file__).parent.parent / "vectors" / "etcd-raft"

_ARGUMENT = re.compile(r"([a-z]+)(?:=(\([^)]*\)|\S+))?")


class Case(NamedTuple):
    line: int  # of its command, from 1
    command: str
    arguments: dict[str, list[str]]
    input: list[str]
    expected: str


def read_cases(path: Path) -> list[Case]:
    lines = path.read_text().split("\n")
    cases = []
    at = 0
    while at < len(lines):
        if not lines[at] or lines[at].startswith("#"):
            at += 1
            continue
        start = at
        separator = lines.index("----", start)
        end = separator + 1
        while end < len(lines) and lines[end]:
            end += 1
        command, arguments = _read_command(lines[start])
        cases.append(
            Case(
                start + 1,
                command,
                arguments,
                lines[start + 1 : separator],
                "\n".join(lines[separator + 1 : end]),
            )
        )
        at = end
    return cases


def _read_command(line: str) -> tuple[str, dict[str, list[str]]]:
    """`name key=value key=(v1, v2)`; a blank may follow a comma."""
    name, _, rest = line.partition(" ")
    arguments = {}
    at = 0
    while at < len(rest):
        if rest[at] == " ":
            at += 1
            continue
        found = _ARGUMENT.match(rest, at)
        assert found is not None, line
        key, value = found.groups()
        if value is None:
            arguments[key] = [""]
        elif value.startswith("("):
            arguments[key] = [each.strip() for each in value[1:-1].split(",")]
        else:
            arguments[key] = [value]
        at = found.end()
    return name, arguments

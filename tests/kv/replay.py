"""Applies a log of encoded commands to an empty state and prints the state's hash.

python -m tests.kv.replay FILE     (FILE: u32 length, then the bytes, of each entry)
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from aspenfs.kv import commands
from aspenfs.kv.machine import evaluate, state_hash
from aspenfs.kv.memory import MemoryState


def write_log(path: Path, entries: Sequence[bytes]) -> None:
    path.write_bytes(b"".join(len(entry).to_bytes(4, "little") + entry for entry in entries))


def read_log(path: Path) -> Iterable[bytes]:
    data = path.read_bytes()
    place = 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "little")
        yield data[place + 4 : place + 4 + size]
        place += 4 + size


def replayed(entries: Iterable[bytes]) -> MemoryState:
    """The state after `entries`, each applied before the next is evaluated: no overlay."""
    state = MemoryState()
    for index, entry in enumerate(entries, 1):
        state.apply(evaluate(state, index, commands.decode(entry)).effects)
    return state


if __name__ == "__main__":
    print(state_hash(replayed(read_log(Path(sys.argv[1])))).hex())

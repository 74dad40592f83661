"""The same log gives the same state: in any interpreter, through the overlay or without it."""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aspenfs import errors
from aspenfs.kv import commands
from aspenfs.kv.commands import Command
from aspenfs.kv.engine import Engine
from aspenfs.kv.machine import state_hash
from aspenfs.kv.memory import MemoryState
from aspenfs.kv.types import Record
from tests.kv.replay import replayed, write_log
from tests.kv.subject import FakeClock, FakeEntropy
from tests.properties.kv_commands import log_commands

ROOT = Path(__file__).parents[2]


def _state_by_engine(log: Sequence[bytes], batches: random.Random) -> MemoryState:
    """The state as a node makes it: accepted through the overlay, applied in batches of any size."""
    base = MemoryState()
    engine = Engine(base, FakeClock(), FakeEntropy(), trio.Event)
    for entry in log:
        engine.submit(commands.decode(entry))
        if batches.random() < 0.2:
            upto = batches.randint(engine.committed_revision, engine.revision)
            engine.committed_to(upto)
            base.apply(engine.overlay.pending(upto))
            engine.overlay.settle(upto)
    base.apply(engine.overlay.pending(engine.revision))
    return base


def _hash_elsewhere(log: Path, seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kv.replay", str(log)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@settings(max_examples=100, deadline=None)
@given(st.lists(log_commands, max_size=30), st.integers())
def test_the_overlay_and_batches_make_no_difference(script: list[Command], seed: int) -> None:
    log = [commands.encode(command) for command in script]
    assert state_hash(_state_by_engine(log, random.Random(seed))) == state_hash(replayed(log))


def test_interpreters_with_other_hash_seeds_get_the_same_state(tmp_path: Path) -> None:
    log: list[bytes] = []

    @settings(max_examples=25, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(log_commands, min_size=20, max_size=40))
    def collect(script: list[Command]) -> None:
        log.extend(commands.encode(command) for command in script)

    collect()
    assert len(log) > 300
    write_log(tmp_path / "log", log)
    state = replayed(log)
    assert sum(1 for _ in state.items(b"", b"")) > 10
    expected = state_hash(state).hex()
    assert _hash_elsewhere(tmp_path / "log", "0") == expected
    assert _hash_elsewhere(tmp_path / "log", "4711") == expected


@settings(max_examples=300, deadline=None)
@given(log_commands, st.data())
def test_damaged_commands_are_refused_or_evaluate(command: Command, data: st.DataObject) -> None:
    """A command from elsewhere never does worse than an error of its own."""
    entry = bytearray(commands.encode(command))
    for _ in range(data.draw(st.integers(1, 3))):
        entry[data.draw(st.integers(0, len(entry) - 1))] = data.draw(st.integers(0, 255))
    try:
        commands.decode(bytes(entry))
    except (errors.InvalidArgument, errors.NotSupported):
        return
    replayed([bytes(entry)])


def test_the_state_hash_tells_states_apart() -> None:
    hashes = set()
    rows = [(b"a", b"bc"), (b"ab", b"c"), (b"a", b"b"), (b"a", b"")]
    for key, value in rows:
        state = MemoryState()
        state.apply([(key, Record(value, 1, 1, 1, 0, 0, {}))])
        hashes.add(state_hash(state))
    assert len(hashes | {state_hash(MemoryState())}) == len(rows) + 1

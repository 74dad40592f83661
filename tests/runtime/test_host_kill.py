"""kill -9 of a real process under load: what it had called accepted is there, and nothing else."""

import fcntl
import random
import subprocess
import sys
from pathlib import Path

import trio

from aspenfs.kv.local import LocalStore
from aspenfs.kv.machine import state_hash
from tests.kv.subject import FakeClock, FakeEntropy
from tests.runtime.host_driver import load

ROUNDS = 10


def _start(directory: Path) -> "subprocess.Popen[bytes]":
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.runtime.killed_writer", str(directory)], stdout=subprocess.PIPE
    )
    # So that it is soon as far as we have read: the model has no compaction, which comes after 11,000.
    assert writer.stdout is not None
    fcntl.fcntl(writer.stdout, fcntl.F_SETPIPE_SZ, 4096)
    return writer


def _accepted(writer: "subprocess.Popen[bytes]", words_before_kill: int) -> int:
    """Kills `writer` after so many words of it; the last revision that it had called accepted."""
    assert writer.stdout is not None
    accepted = 0
    for count, line in enumerate(writer.stdout):
        if count == words_before_kill:
            writer.kill()
        if line.startswith(b"accepted") and line.endswith(b"\n"):
            accepted = int(line.split()[1])
    writer.stdout.close()
    writer.wait()
    return accepted


def test_a_killed_process_loses_nothing_that_it_accepted(tmp_path: Path) -> None:
    rng = random.Random(9)
    model = LocalStore(FakeClock(), FakeEntropy(), trio.Event)

    async def follow(revision: int) -> bytes:
        while model.revision < revision:
            await model.txn([], load(model.revision + 1))
        return state_hash(model.state)

    accepted = 0
    for _ in range(ROUNDS + 1):
        writer = _start(tmp_path)
        assert writer.stdout is not None
        word, revision, found = writer.stdout.readline().split()
        assert word == b"open"
        # One more than it said may be there: killed between the log and the telling.
        assert accepted <= int(revision) <= accepted + 1
        assert bytes.fromhex(found.decode()) == trio.run(follow, int(revision))
        accepted = max(int(revision), _accepted(writer, rng.choice((0, 3, 100, 700, 1500))))
    assert 1000 < accepted < 11_000

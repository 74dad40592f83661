"""Rounds of load, kill -9, recovery and comparison on one mount: for `test_kill.py` and `tools/torture`.

A round: workers change the tree, each its own part of it (some in directories that all share); at a random
point the daemon is killed; sometimes the next daemon is killed too while it recovers; `aspen check
--offline`; mount; every worker's part must be in the state after its last acknowledged operation, or the
one that was under way must be there as a whole; `aspen check`.
"""

import contextlib
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple

from tests.mount.load import Job, look
from tests.mount.load_model import Model, Operation, Seen
from tests.mount.mounting import BIN, ROOT, Mount, alive, wait_for

WORKERS: Final = 4
JOURNAL_BYTES_MIN, JOURNAL_BYTES_MAX = 10_000, 200_000  # written by all workers before the kill
WAIT_S: Final = 60.0
ROUND_S: Final = 300.0


class Round(NamedTuple):
    """What one round did, for the tables of long runs."""

    operations: int  # acknowledged before the kill
    cut_off: int  # under way when it came
    found_done: int  # of these, there afterwards
    names: int  # compared
    bytes: int
    starts_killed: int
    offline: bool  # checked before the next mount
    recovery_s: float


class Damaged(AssertionError):
    """What was promised is not there."""


class Torture:
    def __init__(self, mount: Mount, seed: int, *, workers: int = WORKERS) -> None:
        self.mount = mount
        self.rng = random.Random(seed)
        self.models = [Model() for _ in range(workers)]
        self.kinds: Counter[str] = Counter()
        self.number = 0
        for tree in ("files", "kv"):
            (mount.mountpoint / tree / "shared").mkdir()

    def round(self, end: signal.Signals = signal.SIGKILL) -> Round:
        """One round; with SIGTERM as its `end` the daemon ends by itself, in the middle of the same load."""
        self.number += 1
        self.mount.extend(ROUND_S)
        base = self.mount.base / f"round-{self.number}"
        base.mkdir()
        jobs = self._jobs(base)
        processes = [self._start(base, job) for job in jobs]
        self._wait_for_load(jobs, processes)
        os.kill(self.mount.pid, end)
        if not wait_for(lambda: not alive(self.mount.pid), WAIT_S):
            raise Damaged(f"the daemon does not end in round {self.number}")
        Path(jobs[0].stop).touch()
        starts_killed = 0
        while end == signal.SIGKILL and self.rng.random() < 0.25:
            self._kill_while_starting()
            starts_killed += 1
        offline = self.rng.random() < 0.5
        if offline:
            self._check("--offline")
        begun = time.monotonic()
        self.mount.start()
        recovery_s = time.monotonic() - begun
        for process in processes:
            process.wait(WAIT_S)
        found = look(self.mount.mountpoint)
        operations = cut_off = found_done = 0
        for job, model in zip(jobs, self.models, strict=True):
            done, pending = _replayed(job, model)
            self.kinds.update(operation[0] for operation in done)
            operations += len(done)
            cut_off += pending is not None
            mine = {path: seen for path, seen in found.items() if owner(path) == job.number}
            right = _identified(model, pending, mine)
            found_done += pending is not None and right is not model
            self.models[job.number] = right
        self._check()
        self.mount.assert_healthy()
        volume = sum(len(seen.content) for seen in found.values())
        return Round(operations, cut_off, found_done, len(found), volume, starts_killed, offline, recovery_s)

    def finish(self) -> None:
        """A regular end, after which everything is still there."""
        self.mount.stop()
        self._check("--offline")
        self.mount.start()
        found = look(self.mount.mountpoint)
        for number, model in enumerate(self.models):
            _identified(model, None, {path: seen for path, seen in found.items() if owner(path) == number})

    # --- the parts of a round ---

    def _jobs(self, base: Path) -> list[Job]:
        return [
            Job(
                number,
                self.rng.getrandbits(48),
                model,
                str(self.mount.mountpoint),
                str(self.mount.state),
                str(BIN / "aspen"),
                str(base / f"journal-{number}"),
                str(base / "stop"),
            )
            for number, model in enumerate(self.models)
        ]

    @staticmethod
    def _start(base: Path, job: Job) -> subprocess.Popen[bytes]:
        file = base / f"job-{job.number}"
        file.write_bytes(pickle.dumps(job))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.mount.load", str(file)], env=environment, cwd=base
        )

    def _wait_for_load(self, jobs: list[Job], processes: list[subprocess.Popen[bytes]]) -> None:
        """Until the journals are so long, which is different in each round."""
        wanted = int(JOURNAL_BYTES_MIN * (JOURNAL_BYTES_MAX / JOURNAL_BYTES_MIN) ** self.rng.random())

        size = 0

        def grows() -> bool:
            nonlocal size
            before, size = size, 0
            for job in jobs:
                with contextlib.suppress(FileNotFoundError):
                    size += os.stat(job.journal).st_size
            return size > before or any(process.poll() is not None for process in processes)

        while size < wanted and all(process.poll() is None for process in processes):
            if not wait_for(grows, WAIT_S):
                raise Damaged(f"the load stands still in round {self.number}")
        for job, process in zip(jobs, processes, strict=True):
            if process.poll() is not None:
                tail = Path(job.journal).read_text()[-800:]
                raise Damaged(f"worker {job.number} ended before the kill: {tail}")

    def _kill_while_starting(self) -> None:
        """Somewhere between its first line and its first answer."""
        before = (self.mount.state / "daemon.pid").read_text()
        command = [sys.executable, "-m", "aspenfs.cli.mount", "demo", str(self.mount.mountpoint)]
        environment = {**os.environ, **self.mount.environment}
        starting = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)

        def has_begun() -> bool:
            return (self.mount.state / "daemon.pid").read_text() != before or starting.poll() is not None

        assert wait_for(has_begun, WAIT_S)
        time.sleep(self.rng.random() * 0.2)  # no wait for anything: the moment of the kill is the lot drawn
        self.mount.pid = int((self.mount.state / "daemon.pid").read_text())
        if not alive(self.mount.pid):
            told = starting.communicate(timeout=WAIT_S)[1].decode()
            log = self.mount.new_log()[-3000:]
            raise Damaged(f"round {self.number}: no start after a kill: {told}\n{log}")
        self.mount.kill()
        starting.communicate(timeout=WAIT_S)

    def _check(self, *arguments: str) -> None:
        done = subprocess.run(
            [str(BIN / "aspen"), "check", *arguments],
            env={**os.environ, **self.mount.environment},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        if done.returncode or not done.stdout.endswith("clean\n"):
            raise Damaged(f"round {self.number}: aspen check {arguments}:\n{done.stdout}{done.stderr}")


def owner(path: str) -> int:
    """The number of the worker to which a path belongs; all its names begin with it."""
    found = re.match(r"(?:files|kv)/(?:shared/)?w(\d+)", path)
    assert found is not None, f"nobody has made {path}"
    return int(found[1])


def _replayed(job: Job, model: Model) -> tuple[list[Operation], Operation | None]:
    """Brings the model to the last acknowledged operation; these, and the one that was not."""
    done: list[Operation] = []
    pending: Operation | None = None
    for line in Path(job.journal).read_text().splitlines():
        word, *rest = json.loads(line)
        match word:
            case "start":
                pending = rest[0]
            case "done":
                assert pending is not None
                model.apply(pending)
                done.append(pending)
                pending = None
            case "failed":
                raise Damaged(f"worker {job.number}: {rest[0]}")
    return done, pending


def _identified(model: Model, pending: Operation | None, found: dict[str, Seen]) -> Model:
    """The state among the possible ones that is there."""
    for candidate in [model] if pending is None else model.possible(pending):
        if candidate.seen() == found:
            return candidate
    expected = model.seen()
    wrong = [path for path in sorted(expected.keys() | found.keys()) if expected.get(path) != found.get(path)]
    lines = [
        f"{path}:\n  not {_short(expected.get(path))}\n  but {_short(found.get(path))}" for path in wrong
    ]
    raise Damaged("\n".join([f"cut off: {pending}", *lines[:12]]))


def _short(seen: Seen | None) -> str:
    if seen is None:
        return "nothing"
    return f"{seen._replace(content=seen.content[:16])} {len(seen.content)} bytes"

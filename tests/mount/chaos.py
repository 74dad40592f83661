"""Random faults under load on a cluster of real mounts, and what must hold during and after them.

For `tools/chaos` and a short test. A run: load at every mount (`chaos_load.py`), faults one after the
other (`chaos_faults.py`). After each, every mount must be usable within USABLE_S. Now and then, and at the
end, the load pauses: the states of all nodes must be alike. At the end everything that was written is
read once more at every mount, and the histories are judged: nothing acknowledged is lost, nothing happened
twice, and there is one order of all calls on each thing that is true to real time.
"""

import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from aspenfs.kv.types import prefix_end
from aspenfs.sim import history, linearizability
from aspenfs.sim.history import NEVER, Operation
from aspenfs.sim.models import AppendList, Entries, Model, Register
from aspenfs.sim.revisions import Answer, Change, Watched, check_answers, check_watch
from tests.mount.chaos_clients import PREFIX, THE_END, Job
from tests.mount.chaos_faults import Fault, Nemesis
from tests.mount.clusters import Cluster, Ended
from tests.mount.mounting import ROOT
from tests.mount.networks import usable_network

USABLE_S: Final = 10.0  # from the heal on, which includes starting the nodes that were killed
CALM_S: Final = 60.0  # to become alike when nothing changes any more
EPOCH_S: Final = 5.0
COMPARE_EVERY: Final = 8  # faults
_FINISH_S: Final = 300.0
MODELS: Final[dict[str, Callable[[], Model]]] = {
    "keys": Register, "files": Register, "names": Entries, "appends": AppendList,
}  # fmt: skip


class Broken(AssertionError):
    """What was promised does not hold."""


class Report(NamedTuple):
    """What a run did and found out, for tables."""

    seed: int
    seconds: float
    nodes: int
    network: str
    faults: dict[str, int]
    torn_bytes: int
    usable_s: list[float]  # after each fault
    states_compared: int
    calls: dict[str, dict[str, int]]  # by client and outcome
    revisions_watched: int
    judged_s: float


class Load:
    """The process that loads one mount."""

    def __init__(self, job: Job) -> None:
        file = Path(f"{job.output}-job")
        file.write_bytes(pickle.dumps(job))
        self.job = job
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.mount.chaos_load", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def done(self) -> None:
        """Waits for its answer."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "done\n":
            raise Broken(f"the load at node {self.job.number} ended with {self.process.wait()}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Chaos:
    """One run. A context manager: nothing is left behind."""

    def __init__(self, seed: int, *, nodes: int = 3, hurry: float = 1.0, usable_s: float = USABLE_S,
                 say: Callable[[str], object] = lambda _: None) -> None:  # fmt: skip
        """`hurry`: how much shorter than usual faults last."""
        self.seed, self.rng, self.say = seed, random.Random(seed), say
        self.cluster = Cluster(nodes, network=usable_network(nodes), options="consistency=strict",
                               deadline_s=_FINISH_S)  # fmt: skip
        self.usable_within_s = usable_s
        self.loads: list[Load] = []
        self.faults: list[Fault] = []
        self.usable_s: list[float] = []
        self.compared = 0
        try:
            self.nemesis = Nemesis(self.cluster, self.rng, hurry=hurry)
        except BaseException:
            self.cluster.close()
            raise

    def __enter__(self) -> "Chaos":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.cluster.close()  # who waits for a mount is freed by its end
        finally:
            for load in self.loads:
                load.close()

    def run(self, kinds: Iterator[str] | None = None, *, seconds: float = NEVER) -> Report:
        """Strikes with `kinds` in order, or at random for `seconds`. Broken says what does not hold."""
        begun = time.monotonic()
        self.cluster.start()
        (self.cluster[1]).sh("mkdir files/chaos kv/chaos")
        self._start_load(time.monotonic())
        for kind in kinds if kinds is not None else self._at_random(begun + seconds):
            self._strike(kind)
            if len(self.faults) % COMPARE_EVERY == 0:
                self._ask_all("pause")
                self._compare()
                self._ask_all("go on")
        histories, told = self._finish()
        judging = time.monotonic()
        watched = judge(histories, told)
        return Report(
            self.seed,
            round(time.monotonic() - begun, 1),
            len(self.cluster),
            type(self.cluster.network).__name__,
            dict(Counter(fault.kind for fault in self.faults)),
            sum(fault.torn_bytes for fault in self.faults),
            self.usable_s,
            self.compared,
            {name: _counted(operations) for name, operations in histories.items()},
            watched,
            round(time.monotonic() - judging, 1),
        )

    def _at_random(self, end: float) -> Iterator[str]:
        """Every kind once, in a random order, then again."""
        while True:
            for kind in self.rng.sample(list(self.nemesis.kinds), len(self.nemesis.kinds)):
                if time.monotonic() > end:
                    return
                yield kind

    def _strike(self, kind: str) -> None:
        self.cluster.extend()
        fault = self.nemesis.strike(kind)
        self.faults.append(fault)
        healing = time.monotonic()
        try:
            self.nemesis.heal()
            self.cluster.wait_usable(self.usable_within_s - (time.monotonic() - healing))
        except (Ended, AssertionError) as error:
            raise Broken(f"not usable after {fault}: {error}\n{self.cluster.describe()}") from error
        self.usable_s.append(round(time.monotonic() - healing, 2))
        self.say(f"{fault.kind:10} nodes {', '.join(map(str, fault.nodes))}: {fault.seconds} s, usable "
                 f"{self.usable_s[-1]} s after the heal")  # fmt: skip

    # --- the load ---

    def _start_load(self, began: float) -> None:
        for node in self.cluster:
            job = Job(node.number, self.seed, str(node.mountpoint), str(node.state / "ctl.sock"),
                      str(node.base / "load"), began, EPOCH_S)  # fmt: skip
            self.loads.append(Load(job))
        for load in self.loads:
            load.done()

    def _ask_all(self, word: str) -> None:
        for load in self.loads:
            load.say(word)
        for load in self.loads:
            load.done()

    def _compare(self) -> None:
        """Nothing changes now: every node must come to the same state."""
        self.cluster.wait_healthy(CALM_S)
        digests = self.cluster.digests(CALM_S)
        if len(set(digests.values())) != 1:
            raise Broken(f"the states differ: {digests}\n{self.cluster.describe()}")
        self.compared += 1

    def _finish(self) -> tuple[dict[str, list[Operation]], list[dict[str, Any]]]:
        """Histories by client, and what each mount's process told besides."""
        self.cluster.extend()
        self._ask_all("pause")
        self._compare()
        self.cluster[1].aspen("kv", "put", THE_END.decode(), "")
        self._ask_all("finish")
        self._compare()
        for node in self.cluster:
            found = node.run("aspen", "check", timeout_s=_FINISH_S, check=False)
            if found.returncode:
                raise Broken(f"aspen check at {node}: {found.stdout.decode()}{found.stderr.decode()}")
        histories: dict[str, list[Operation]] = {name: [] for name in MODELS}
        told = []
        for load in self.loads:
            base = Path(load.job.output)
            told.append(pickle.loads(Path(f"{base}-told").read_bytes()))
            for name in MODELS:
                for path in sorted(base.parent.glob(f"{base.name}-{name}-*")):
                    histories[name] += history.load(path.read_text().splitlines())
        return histories, told


def _counted(operations: Sequence[Operation]) -> dict[str, int]:
    known = sum(one.known for one in operations)
    return {"acknowledged": known, "unknown": len(operations) - known}


# --- judging ---


def judge(histories: dict[str, list[Operation]], told: Sequence[dict[str, Any]]) -> int:
    """Broken if anything is wrong; how many revisions were watched."""
    failures = [failure for one in told for failure in one["failures"]]
    if failures:
        raise Broken("\n".join(failures))
    for name, operations in histories.items():
        verdict = linearizability.check(operations, MODELS[name]())
        if verdict.outcome != "linearizable":
            raise Broken(f"{name}: {verdict.explain()}\n{_kept(operations, verdict.keys, MODELS[name]())}")
    watches = [
        Watched(
            PREFIX,
            prefix_end(PREFIX),
            from_revision,
            [Change(revision, events) for revision, events in batches],
            upto,
        )
        for from_revision, upto, batches in (one["watch"] for one in told)
    ]
    log = _log_of(watches)
    wrong = [line for watch in watches for line in check_watch(watch, log)]
    answers = [Answer(*answer) for one in told for answer in one["answers"]]
    # Revisions are of everything: reads stand behind the last change of a key, too.
    end = Change(max(answer.revision for answer in answers) + 1, [])
    wrong += check_answers(answers, [*(log[revision] for revision in sorted(log)), end])
    if wrong:
        raise Broken("\n".join(wrong[:20]))
    return len(log)


def _kept(operations: Sequence[Operation], keys: Sequence[object], model: Model) -> str:
    """Puts the history of these objects where a person can look at it."""
    wanted = [one for one in operations if set(model.keys(one)) & set(keys)]
    with tempfile.NamedTemporaryFile("w", prefix="aspen-chaos-", suffix=".history", delete=False) as file:
        for one in sorted(wanted, key=lambda one: one.called):
            file.write(f"{one}\n")
    return f"the whole history of it: {file.name}"


def _log_of(watches: Sequence[Watched]) -> dict[int, Change]:
    """What happened, of all that was watched; a write is known by its value, which nobody else wrote."""
    log: dict[int, Change] = {}
    for watch in watches:
        for batch in watch.batches:
            values = [value for _, value in batch.events if value]
            log.setdefault(batch.revision, batch._replace(write=values[0] if values else None))
    return log

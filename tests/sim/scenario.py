"""A simulated cluster on which a test says itself what happens: nothing goes wrong but what it asks for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from aspenfs.cluster.types import Role
from aspenfs.errors import AspenError
from aspenfs.kv import types
from aspenfs.kv.commands import Command
from aspenfs.kv.engine import Engine
from aspenfs.kv.types import Compare, Operation, TxnResult
from aspenfs.limits import MIB
from aspenfs.sim import network, serving
from aspenfs.sim.cluster import Cluster, Settings
from aspenfs.sim.process import Process
from aspenfs.sim.scheduler import MS, Streams

WITHIN_MS = 20_000


class Scenario:
    """Node ids count from 1. Everything that waits, waits in virtual time."""

    def __init__(self, nodes: int = 3, *, seed: int = 1, started: bool = True, **settings: Any) -> None:
        roomy = Settings(segment_bytes=MIB)
        self.cluster = Cluster(Streams(seed), replace(roomy, **settings), nodes)
        self.nodes = list(range(1, nodes + 1))
        if started:
            for node in self.nodes:
                self.start(node)

    def __enter__(self) -> "Scenario":
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.close()

    # --- time ---

    @property
    def now_ms(self) -> int:
        return self.cluster.scheduler.now_ns // MS

    def pass_ms(self, duration_ms: int) -> None:
        scheduler = self.cluster.scheduler
        end = scheduler.at(scheduler.now_ns + duration_ms * MS, lambda: None)
        while end.pending:
            scheduler.step()

    def until(self, holds: Callable[[], bool], within_ms: int = WITHIN_MS) -> None:
        deadline = self.now_ms + within_ms
        while not holds():
            assert self.now_ms <= deadline, f"not within {within_ms} ms: {self.described()}"
            assert self.cluster.scheduler.step() is not None, self.described()

    def described(self) -> str:
        return "; ".join(f"{one.node}: {one.described()}" for one in self.cluster.processes())

    # --- nodes ---

    def start(self, node: int) -> Process:
        self.cluster.machines[node].start()
        return self[node]

    def __getitem__(self, node: int) -> Process:
        process = self.cluster.machines[node].process
        assert process is not None, f"node {node} is down"
        return process

    def down(self, node: int, *, power: bool = False) -> None:
        self.cluster.machines[node].down(power)

    def leader(self, *, of: Callable[[Process], bool] = lambda process: True) -> int:
        """Waits for one that has committed in its term."""

        def there() -> list[int]:
            leading = [one for one in self.cluster.processes() if one.raft.role is Role.LEADER and of(one)]
            ready = [one for one in leading if one.raft.committed_in_term]
            return [one.node for one in sorted(ready, key=lambda one: one.raft.term)]

        self.until(lambda: bool(there()))
        return there()[-1]

    def leader_among(self, nodes: list[int]) -> int:
        return self.leader(of=lambda process: process.node in nodes)

    def others(self, *nodes: int) -> list[int]:
        return [node for node in self.nodes if node not in nodes]

    def isolate(self, *nodes: int) -> None:
        self.cluster.network.block(network.halves(list(self.cluster.machines), nodes))

    def heal(self) -> None:
        self.cluster.network.heal()

    def settle(self) -> None:
        """Until all that run have applied the same, and their states have it."""

        def settled() -> bool:
            found = {(one.engine.revision, one.raft.commit) for one in self.cluster.processes()}
            states = [machine.state.durable_index for machine in self.cluster.machines.values() if machine.up]
            return len(found) == 1 and {*states} == {revision for revision, _ in found}

        self.until(settled)

    # --- clients ---

    def submit(self, node: int, command: Command) -> "Answer":
        answer = Answer(self)
        process = self[node]
        process.do(serving.submit, process, command, answer.came)
        return answer

    def txn(self, node: int, compares: list[Compare], then: list[Operation],
            dedup: tuple[bytes, int] | None = None) -> "Answer":  # fmt: skip
        command, _ = self[node].engine.txn_command(compares, then, (), dedup)
        return self.submit(node, command)

    def put(self, node: int, key: bytes, value: bytes) -> TxnResult:
        result = self.txn(node, [], [types.put(key, value)]).result()
        assert isinstance(result, TxnResult), result
        return result

    def ask(self, node: int, look: Callable[[Engine], Any]) -> "Answer":
        """A linearizable read of whatever `look` looks at."""
        answer = Answer(self)
        process = self[node]

        def seen(what: Any, revision: int) -> None:
            answer.came(what)

        process.do(serving.read, process, look, seen, lambda: answer.came(NO_QUORUM))
        return answer

    def get(self, node: int, key: bytes) -> Any:
        return self.ask(node, lambda engine: value(engine, key)).result()


NO_QUORUM = AspenError("no quorum")


class Answer:
    """What a client waits for."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._results: list[Any] = []

    def came(self, result: Any) -> None:
        assert not self._results, "two answers"
        self._results.append(result)

    @property
    def there(self) -> bool:
        return bool(self._results)

    def result(self, within_ms: int = WITHIN_MS) -> Any:
        self._scenario.until(lambda: self.there, within_ms)
        return self._results[0]


def value(engine: Engine, key: bytes) -> bytes | None:
    record = engine.get(key)
    return None if record is None else record.value

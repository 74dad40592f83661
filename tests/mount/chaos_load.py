"""The load of a chaos run at one mount: a process of its own, which outlives every daemon.

    python -m tests.mount.chaos_load JOB        (a pickled `Job`)

Commands come in on stdin, a line each, and are answered with `done`: `pause` (no call is under way when it
is answered), `go on`, `finish` (all that was ever written is read once more; histories are written; the
process ends). Clients must be paused before `finish`.
"""

import pickle
import sys
from pathlib import Path
from typing import Final

from aspenfs.sim import history
from tests.mount.chaos_clients import Gate, Job, Keys, Watcher, Workload
from tests.mount.chaos_files import Appends, Files, Names

WATCH_S: Final = 60.0  # for the end to be seen


class Load:
    def __init__(self, job: Job) -> None:
        self.job, self.gate = job, Gate()
        kinds: list[type[Workload]] = [Keys, Keys, Names, Files, Appends]
        self.clients = [kind(job, number, self.gate) for number, kind in enumerate(kinds)]
        self.watcher = Watcher(job)

    def serve(self) -> None:
        self.watcher.thread.start()
        self.watcher.begun.wait(WATCH_S)  # what was written before it could not be held against anything
        for client in self.clients:
            client.thread.start()
        print("done", flush=True)
        for line in sys.stdin:
            match line.strip():
                case "pause":
                    self.gate.close()
                case "go on":
                    self.gate.open()
                case "finish":
                    self._finish()
                    print("done", flush=True)
                    return
            print("done", flush=True)

    def _finish(self) -> None:
        """Expects that clients are paused."""
        for client in self.clients:
            client.over.set()
        self.gate.open()
        for client in self.clients:
            client.thread.join()
            if not client.failure:
                try:
                    client.read_all(client.epoch + 1)
                except Exception as error:
                    client.failure = f"{client.name} at node {self.job.number}, reading all: {error!r}"
        self.watcher.thread.join(WATCH_S)
        if self.watcher.thread.is_alive():
            self.watcher.failure = f"watch at node {self.job.number}: the end was not seen"
        self._write()

    def _write(self) -> None:
        for client in self.clients:
            with open(f"{self.job.output}-{client.name}-{client.process}", "w", encoding="utf-8") as file:
                history.save(client.history.operations(), file)
        answers = [answer for client in self.clients if isinstance(client, Keys) for answer in client.answers]
        failures = [*(client.failure for client in self.clients), self.watcher.failure]
        told = {
            "answers": answers,
            "watch": (self.watcher.from_revision, self.watcher.upto, self.watcher.batches),
            "failures": [failure for failure in failures if failure],
        }
        Path(f"{self.job.output}-told").write_bytes(pickle.dumps(told))


if __name__ == "__main__":
    Load(pickle.loads(Path(sys.argv[1]).read_bytes())).serve()

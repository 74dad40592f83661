"""The thread that writes committed effects into the state, in batches, off the path of any request.

Belongs here: what a batch is, patience with a full disk, giving way to the loop. Not here: when to
apply (`host.py`), the transaction itself (`statedb.py`).

The loop hands over effects entry by entry (`add`), then tells how far the log is committed
(`request`). A batch is a whole number of entries, each key once with its newest record, and ends where a
checkpoint is: so all nodes have, for a moment, the state at that very entry on their disks. When it is
in the state the loop gets the indices at which the overlay may be settled step by step: dropping
tens of thousands of effects at once would stall it.

Threads: `add` and `request` are called by the loop's thread, all else that changes is the applier's.
The deque between them needs no lock: one thread appends, the other takes from the left.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue

from aspenfs.errors import NoSpace
from aspenfs.kv.types import Record
from aspenfs.limits import APPLY_BATCH_KEYS_MAX, MIB
from aspenfs.runtime.loop_turns import LoopTurns
from aspenfs.runtime.statedb import StateDb
from aspenfs.runtime.syncer import Loop

Effects = Sequence[tuple[bytes, Record | None]]

_APPLY, _SYNC, _STOP = range(3)
_STEP_EFFECTS = 512  # settled in one go: about 0.2 ms of the loop
_BATCH_BYTES_MAX = 16 * MIB  # of values in one transaction
_GATHERED_EFFECTS = 1_024  # in one go, for a batch: about 0.2 ms
_RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)  # a full disk is looked at again after so long


class Applier:
    """Carries committed effects into `state`."""

    def __init__(self, state: StateDb, applied: Callable[[list[int]], object],
                 stalled: Callable[[NoSpace], object], failed: Callable[[BaseException], object],
                 meta_at: Callable[[int], Mapping[str, bytes]] | None = None) -> None:
        """In the loop's thread: `applied` gets the steps of a batch, the last one its applied index,
        and is called after a sync;
        `stalled` the reason why there will be none for a while; `failed` what ended the thread.
        `meta_at`, in any thread, tells what the state keeps beside the entries up to an index."""
        self.state = state
        self._meta_at = meta_at or _no_meta
        self._applied, self._stalled, self._failed = applied, stalled, failed
        # Called in the thread, when the state has everything up to a checkpoint and nothing behind it.
        self.at_checkpoint: Callable[[int], object] | None = None
        self._backlog: deque[tuple[int, Effects]] = deque()
        self._checkpoints: deque[int] = deque()  # entries with which a batch ends
        self._queue: SimpleQueue[int] = SimpleQueue()  # wakes the thread: _APPLY, _SYNC or _STOP
        self._requested = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.batches = 0
        self.told = state.applied_index  # of the last batch that the loop has heard of

    # --- the loop's thread ---

    def add(self, index: int, effects: Effects) -> None:
        """The effects of entry `index`, in order of the entries."""
        self._backlog.append((index, effects))

    def checkpoint(self, index: int) -> None:
        """A batch is to end with entry `index`, which is the next to be added."""
        self._checkpoints.append(index)

    def discard_after(self, index: int) -> None:
        """Forget entries above `index`, none of which is committed."""
        while self._backlog and self._backlog[-1][0] > index:
            self._backlog.pop()

    def rebase(self, index: int) -> None:
        """The state has all up to `index` from elsewhere; no thread runs. What waits is forgotten."""
        self._backlog.clear()
        self._checkpoints.clear()
        self._requested = self.told = index

    def request(self, index: int) -> None:
        """Entries up to `index` are committed and shall be applied."""
        if index > self._requested:
            self._requested = index
            self._queue.put(_APPLY)

    def request_sync(self) -> None:
        """What is applied shall be durable in the state; `applied` gets no steps then."""
        self._queue.put(_SYNC)

    def start(self, loop: Loop) -> None:
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="state-apply", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the batch under way; blocks until then. Idempotent."""
        if self._thread is not None:
            self._stopping.set()
            self._queue.put(_STOP)
            self._thread.join()
            self._thread = None

    # --- the applier's thread; the caller's when there is none ---

    def apply_now(self, upto: int) -> list[int]:
        """Applies entries up to `upto` in the calling thread; the steps to settle. NoSpace keeps them."""
        steps: list[int] = []
        while batch := self._next_batch(upto, None):
            items, batch_steps = batch
            try:
                self.state.apply(items, batch_steps[-1], self._meta_at(batch_steps[-1]))
            except NoSpace:
                self._backlog.appendleft((batch_steps[-1], items))
                raise
            self._is_checkpoint(batch_steps[-1])
            self.told = batch_steps[-1]
            steps += batch_steps
        return steps

    def _run(self, loop: Loop) -> None:
        turns = LoopTurns(loop)
        try:
            while not self._stopping.is_set():
                if self._queue.get() == _SYNC:
                    self.state.sync()
                    loop.run_sync_soon(self._applied, [])
                # Up to the newest request, so that those queued meanwhile find nothing to do: many
                # small batches cost a sync each.
                while not self._stopping.is_set() and (batch := self._next_batch(self._requested, turns)):
                    self._apply_patiently(*batch, loop, turns)
        except BaseException as error:
            turns.end()
            loop.run_sync_soon(self._failed, error)

    def _apply_patiently(self, items: Effects, steps: list[int], loop: Loop, turns: LoopTurns) -> None:
        """Applies one batch; on a full disk again and again, until it works or the applier stops."""
        attempt = 0
        while True:
            try:
                self.state.apply(items, steps[-1], self._meta_at(steps[-1]), pace=turns)
                break
            except NoSpace as error:
                turns.end()
                loop.run_sync_soon(self._stalled, error)
            if self._stopping.wait(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)]):
                self._backlog.appendleft((steps[-1], items))
                return
            attempt += 1
        self.batches += 1
        if self._is_checkpoint(steps[-1]) and self.at_checkpoint is not None:
            self.at_checkpoint(steps[-1])
        loop.run_sync_soon(self._tell, steps)

    def _tell(self, steps: list[int]) -> None:
        """In the loop's thread, after what `at_checkpoint` has told it."""
        self.told = steps[-1]
        self._applied(steps)

    def _is_checkpoint(self, index: int) -> bool:
        """Whether the batch that ends with `index`, now in the state, had to end there."""
        if not self._checkpoints or index < self._checkpoints[0]:
            return False
        self._checkpoints.popleft()
        return True

    def _next_batch(self, upto: int, turns: LoopTurns | None) -> tuple[Effects, list[int]] | None:
        """The newest record of each key in the next entries up to `upto`, and the steps to settle them."""
        backlog = self._backlog
        last = min(upto, self._checkpoints[0]) if self._checkpoints else upto
        if not backlog or backlog[0][0] > last:
            return None
        if turns is not None:
            turns.begin()
        newest: dict[bytes, Record | None] = {}
        steps: list[int] = []
        index = in_step = gathered = size = 0
        while (backlog and backlog[0][0] <= last
                and len(newest) < APPLY_BATCH_KEYS_MAX and size < _BATCH_BYTES_MAX):  # fmt: skip
            index, effects = backlog.popleft()
            newest.update(effects)
            in_step += len(effects)
            gathered += len(effects)
            for _, record in effects:
                if record is not None:
                    size += len(record.value)
            if in_step >= _STEP_EFFECTS:
                steps.append(index)
                in_step = 0
            if gathered >= _GATHERED_EFFECTS and turns is not None:
                gathered = 0
                turns.begin()
        if not steps or steps[-1] != index:
            steps.append(index)
        return list(newest.items()), steps


def _no_meta(_: int) -> Mapping[str, bytes]:
    return {}

"""A bound for the log: a disk that fails under a busy program must not be filled with complaints about it."""

import logging
import time
from collections.abc import Callable
from typing import Final

RECORDS_MAX: Final = 30  # of one kind
PERIOD_S: Final = 60.0
_KINDS_MAX: Final = 1_000


class FloodFilter(logging.Filter):
    """Lets through the first RECORDS_MAX records of a kind in each period, and says how many there were.

    A kind is a message before its figures are put in, and the logger.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[tuple[str, object], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.name, record.msg
        now = self._clock()
        began, count = self._kinds.get(kind, (now, 0))
        if now - began >= PERIOD_S:
            if count > RECORDS_MAX:
                record.msg = f"{record.getMessage()} ({count - RECORDS_MAX} like this were left out before)"
                record.args = None
            began, count = now, 0
        if kind not in self._kinds and len(self._kinds) >= _KINDS_MAX:
            self._kinds.clear()
        self._kinds[kind] = began, count + 1
        return count < RECORDS_MAX

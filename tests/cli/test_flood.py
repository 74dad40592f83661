"""What is said again and again is written a bounded number of times, and counted."""

import io
import logging

from aspenfs.cli.flood import PERIOD_S, RECORDS_MAX, FloodFilter


class Log:
    def __init__(self) -> None:
        self.now = 0.0
        self.text = io.StringIO()
        handler = logging.StreamHandler(self.text)
        handler.addFilter(FloodFilter(lambda: self.now))
        self.logger = logging.Logger("test")
        self.logger.addHandler(handler)

    def lines(self) -> list[str]:
        lines = self.text.getvalue().splitlines()
        self.text.seek(0)
        self.text.truncate()
        return lines


def test_a_flood_is_cut_and_counted_and_other_messages_pass() -> None:
    log = Log()
    for number in range(1000):
        log.logger.error("read: %d", number)
    log.logger.error("something else")
    assert log.lines() == [f"read: {number}" for number in range(RECORDS_MAX)] + ["something else"]
    log.now += PERIOD_S
    log.logger.error("read: %d", 1000)
    log.logger.error("read: %d", 1001)
    left_out = 1000 - RECORDS_MAX
    assert log.lines() == [f"read: 1000 ({left_out} like this were left out before)", "read: 1001"]


def test_messages_without_end_take_bounded_memory() -> None:
    log = Log()
    for number in range(5000):
        log.logger.error(f"unlike {number}")
    assert len(log.lines()) == 5000
    (flood,) = log.logger.handlers[0].filters
    assert len(flood._kinds) <= 1000  # type: ignore[union-attr]

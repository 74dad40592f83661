"""No test here may leave a warning or an error in the log, unless it says which."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def expected_errors() -> list[str]:
    """Parts of the log lines that a test expects at WARNING or above."""
    return []


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture, expected_errors: list[str]) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    yield
    loud = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING]
    unexpected = [line for line in loud if not any(part in line for part in expected_errors)]
    assert not unexpected
    assert len(loud) >= len(expected_errors)

"""The housekeeping of a mount, without the mount."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from aspenfs import errors
from aspenfs.cli.beside import Beside


@pytest.mark.parametrize("error", [errors.NoQuorum, errors.Conflict, errors.Overloaded, errors.NoSpace])
def test_a_mount_without_a_session_yet_is_served(error: type[Exception]) -> None:
    async def fails() -> None:
        raise error("not now")

    files: Any = SimpleNamespace(orphans=SimpleNamespace(round=fails))
    nothing: Any = None
    trio.run(Beside(files, nothing, nothing).start)

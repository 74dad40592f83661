"""What a command of the control socket is to the daemon: a handler, called with one `Call`.

Belongs here: the port between the connection (`control.py`) and those who answer (`control_kv.py`,
and whatever the daemon adds).
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple


class Call:
    """One request under way, as its handler sees it."""

    __slots__ = ("_accepted", "_send_item", "client", "params", "uid")

    def __init__(self, params: Mapping[str, Any], client: bytes, uid: int,
                 send_item: Callable[[Any], Awaitable[None]], accepted: Callable[[], None]) -> None:
        self.params, self.client, self.uid = params, client, uid
        self._send_item, self._accepted = send_item, accepted

    async def item(self, value: Any) -> None:
        """Sends one item ahead of the result (it must fit a frame); waits while the client does not read."""
        await self._send_item(value)

    def accepted(self) -> None:
        """Of an `ordered` command: its place is taken, the connection's next request may start."""
        self._accepted()


Handler = Callable[[Call], Awaitable[Any]]


class Command(NamedTuple):
    """`ordered`: no later request of the connection starts before the handler calls `accepted` or ends.

    The handler's return value is the result: whatever msgpack carries. An AspenError that it raises
    goes to the client; anything else is logged as a bug.
    """

    handler: Handler
    ordered: bool = False

"""How a starting daemon says that it is ready, or why it is not.

Started by `mount.aspen`, it says so once, as one line of JSON on an inherited pipe; in the foreground
on stderr, and to systemd where NOTIFY_SOCKET is set (sd_notify(3), spoken here in full).
Both ends of the pipe are here: `report` for the daemon, `await_report` for `mount.aspen`.
"""

import json
import os
import select
import socket
import sys
from collections.abc import Callable, Mapping
from typing import TypedDict

OPTIONS_VARIABLE = "ASPEN_MOUNT_OPTIONS"  # MountOptions as JSON
READY_FD_VARIABLE = "ASPEN_READY_FD"  # the pipe's write end; unset in the foreground
MEANWHILE_S = 0.2  # between two looks at how far a start is
REPORT_BYTES_MAX = 64 * 1024  # far above any text of ours; bounds what a runaway child can make us hold


class Report(TypedDict, total=False):
    """`{"ready": true}`, perhaps with a warning for who mounts, or the cause of the failure and the exit code
    of mount(8) for it."""

    ready: bool
    warning: str
    error: str
    exit: int


def ready_fd(environ: Mapping[str, str]) -> int | None:
    """The pipe to report on; None in the foreground."""
    text = environ.get(READY_FD_VARIABLE)
    if text is None:
        return None
    # A child of the daemon (fusermount3) with this end open would hide the daemon's death.
    os.set_inheritable(int(text), False)
    return int(text)


def report(descriptor: int | None, message: Report) -> None:
    """Tells whoever waits for this daemon how its start went; call it once. Closes the pipe."""
    if message.get("ready"):
        sd_notify("READY=1\nSTATUS=mounted")
    else:
        sd_notify(f"STATUS={message.get('error', 'failed')}")
    if descriptor is None:
        if "error" in message:
            print(f"mount.aspen: {message['error']}", file=sys.stderr, flush=True)
        if "warning" in message:
            print(f"mount.aspen: warning: {message['warning']}", file=sys.stderr, flush=True)
        return
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps(message) + "\n")
    except BrokenPipeError:
        # mount.aspen was ended while it waited. The mount is good without it.
        pass


def await_report(descriptor: int, meanwhile: Callable[[], object] | None = None) -> Report | None:
    """The report of the daemon at the other end; None if it ended without one.

    `meanwhile` is called some times a second until it comes.
    """
    with os.fdopen(descriptor, "rb") as pipe:
        while meanwhile is not None and not select.select([pipe], [], [], MEANWHILE_S)[0]:
            meanwhile()
        line = pipe.readline(REPORT_BYTES_MAX)
    if not line.endswith(b"\n"):
        return None
    message: Report = json.loads(line)
    return message


def sd_notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Sends `state` (lines NAME=value) to systemd; does nothing where it did not start us."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError as error:
            # A manager that does not listen must not cost anyone the mount.
            print(f"mount.aspen: NOTIFY_SOCKET: {error}", file=sys.stderr, flush=True)

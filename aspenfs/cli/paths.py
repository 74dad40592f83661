"""Where a node keeps its state, and the names of the files in there that more than one program uses.

Belongs here: finding the state directory, and the file names that the daemon, `mount.aspen`, `aspen`
and tools/ share. Not here: the formats of the log and of the state (`runtime/`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aspenfs import errors

STATE_DIR_VARIABLE = "ASPEN_STATE_DIR"
ROOT_STATE_DIR = Path("/var/lib/aspenfs")
SOCKET_PATH_BYTES_MAX = 107  # sun_path of unix(7), less its final NUL


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """The directory of one node; one daemon at a time works on it."""

    path: Path

    @property
    def lock(self) -> Path:
        """Held with flock(2) by the daemon for as long as it runs."""
        return self.path / "lock"

    @property
    def pid(self) -> Path:
        """The daemon's process id, a decimal line; there while the daemon runs."""
        return self.path / "daemon.pid"

    @property
    def log(self) -> Path:
        return self.path / "daemon.log"

    @property
    def control_socket(self) -> Path:
        return self.path / "ctl.sock"


def state_directory(environ: Mapping[str, str], uid: int, override: str | None = None) -> StateDirectory:
    """The state directory of user `uid`: `override`, else ASPEN_STATE_DIR, else the usual place.

    The usual place is /var/lib/aspenfs for root, else aspenfs in the XDG state directory. It need
    not exist. InvalidArgument: a relative path, or one too long for the control socket in it.
    """
    chosen = override if override is not None else environ.get(STATE_DIR_VARIABLE) or None
    if chosen is not None:
        path = Path(chosen)
        if not path.is_absolute():
            raise errors.InvalidArgument(f"the state directory must be an absolute path, not {chosen!r}")
    elif uid == 0:
        path = ROOT_STATE_DIR
    else:
        path = _xdg_state_home(environ) / "aspenfs"
    directory = StateDirectory(Path(os.path.normpath(path)))
    if len(os.fsencode(directory.control_socket)) > SOCKET_PATH_BYTES_MAX:
        raise errors.InvalidArgument(
            f"{path}: the state directory's path is too long: its control socket may have "
            f"{SOCKET_PATH_BYTES_MAX} bytes; choose a shorter one with {STATE_DIR_VARIABLE} or -o state_dir="
        )
    return directory


def _xdg_state_home(environ: Mapping[str, str]) -> Path:
    """$XDG_STATE_HOME; the base directory specification has relative paths in it ignored."""
    named = Path(environ.get("XDG_STATE_HOME", ""))
    if named.is_absolute():
        return named
    home = Path(environ.get("HOME", ""))
    if not home.is_absolute():
        raise errors.InvalidArgument(
            f"no place for the state: neither {STATE_DIR_VARIABLE} nor XDG_STATE_HOME nor HOME is set"
        )
    return home / ".local" / "state"

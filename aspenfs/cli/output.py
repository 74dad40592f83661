"""How the `aspen` command speaks: exit codes, errors with their next step, bytes as text or JSON.

Belongs here: what every command of `aspen` shares in what it prints. Not here: any one command.
"""

import binascii
import os
import sys
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import IO, Any, Final

import click

from aspenfs import errors

# 0 done · 2 wrong usage (click's own)
EXIT_REFUSED: Final = 1  # not found, or the daemon said no
EXIT_COMPARE_FAILED: Final = 3
EXIT_UNREACHABLE: Final = 4
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

EXIT_CODES_HELP = """\b
Exit codes:
  0  done
  1  not found, or refused (the message says why)
  2  wrong usage
  3  a compare failed: nothing was changed
  4  no daemon answered
"""

_ADVICE: Mapping[type[errors.AspenError], str] = {
    errors.Unreachable: "`aspen status` tells what is wrong and how to start the daemon",
    errors.AccessDenied: "run it with sudo, or as the user who runs the daemon",
    errors.LeaseNotFound: "`aspen kv lease list` shows those there are; one that ended took its keys",
    errors.Compacted: "older history is not kept: ask for a newer revision, or for none",
    errors.FutureRevision: "leave --revision away to read what is newest",
    errors.NoQuorum: "`aspen status` shows which voters are missing",
    errors.NoSpace: "free some space where the state directory is; writes work again at once",
    errors.TxnTooLarge: "make several smaller transactions of it",
    errors.Overloaded: "try again in a moment",
    errors.NotSupported: "after an upgrade, restart the daemon: it and the command must be of one release",
    errors.RemoteFailure: "`aspen status` names the log",
}


class Failure(click.ClickException):
    """Ends the command: cause, next step, exit code. With `--json` it is one JSON object on stderr."""

    def __init__(self, message: str, *, advice: str = "", exit_code: int = EXIT_REFUSED,
                 name: str = "Refused") -> None:
        super().__init__(message)
        self.advice, self.name = advice, name
        self.exit_code = exit_code  # type: ignore[misc]  # click documents it as the instance's, too
        context = click.get_current_context(silent=True)
        self._as_json = context is not None and bool(context.find_root().meta.get("json"))

    def show(self, file: IO[Any] | None = None) -> None:
        if self._as_json:
            click.echo(to_json({"error": self.name, "message": self.message, "advice": self.advice,
                                "exit_code": self.exit_code}), err=True)
            return
        click.echo(f"aspen: {self.message}", err=True)
        if self.advice:
            click.echo(f"       {self.advice}", err=True)


@contextmanager
def failures() -> Generator[None, None, None]:
    """Turns the errors of daemon and client into `Failure`, Ctrl-C into its exit code."""
    try:
        yield
    except errors.AspenError as error:
        code = EXIT_UNREACHABLE if isinstance(error, errors.Unreachable) else EXIT_REFUSED
        message = str(error) or type(error).__name__
        raise Failure(message, advice=_ADVICE.get(type(error), ""), exit_code=code,
                      name=type(error).__name__) from error
    except OSError as error:  # of the user's own files; the client's are AspenErrors
        where = f"{shown(os.fsencode(error.filename))}: " if error.filename else ""
        raise Failure(f"{where}{error.strerror or error}", name=type(error).__name__) from error
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


# --- bytes ---


def shown(data: bytes, *, limit: int = 0) -> str:
    """`data` for a person's eyes on one line: text as it is, anything else escaped; cut after `limit`."""
    text = data.decode("utf-8", "backslashreplace")
    if limit and len(text) > limit:
        text = f"{text[:limit]}… ({len(data)} bytes)"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def json_bytes(name: str, data: bytes) -> dict[str, str]:
    """{name: text}, or {name: base64, name_encoding: "base64"} for what is not UTF-8."""
    try:
        return {name: data.decode("utf-8")}
    except UnicodeDecodeError:
        return {name: binascii.b2a_base64(data, newline=False).decode("ascii"), f"{name}_encoding": "base64"}


def from_json_bytes(body: Mapping[str, Any], name: str) -> bytes:
    """The bytes that `json_bytes` wrote (or a person, in the same form); ValueError if they are not."""
    data = body.get(name)
    if not isinstance(data, str):
        raise ValueError(f"{name!r} must be text")
    encoding = body.get(f"{name}_encoding", "utf-8")
    if encoding == "base64":
        return binascii.a2b_base64(data, strict_mode=True)
    if encoding != "utf-8":
        raise ValueError(f'"{name}_encoding" is "base64" or absent')
    return data.encode("utf-8", "surrogateescape")


def utc(time_ns: int) -> str:
    """RFC 3339 with all its digits, in UTC: for programs."""
    seconds, ns = divmod(time_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{ns:09}Z"


def local_time(time_ns: int) -> str:
    """To the second, in the local time zone: for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ns // 1_000_000_000))


def span(seconds: int) -> str:
    """A duration as people say it: two units would be one too many."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def to_json(value: Any) -> str:
    import json  # here: `aspen kv get` starts without it

    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def print_json(value: Any) -> None:
    """One JSON document on one line; nothing ahead of it is held back longer than this line."""
    print_bytes([to_json(value).encode("utf-8", "backslashreplace"), b"\n"])


def print_bytes(parts: Iterable[bytes]) -> None:
    """Raw bytes to stdout, whatever the locale."""
    stream = sys.stdout.buffer
    for part in parts:
        stream.write(part)


def flush() -> None:
    sys.stdout.buffer.flush()


def size(count: int) -> str:
    """Bytes with a binary unit, three digits, for people."""
    number, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while number >= 1000 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.3g} {units[0]}"

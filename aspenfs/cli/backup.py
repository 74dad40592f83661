"""`aspen backup`: the whole cluster in one file, taken from the running daemon; and verifying such a file.

Belongs here: the file and what is told meanwhile. Not here: what is in it (`runtime/backup/`).

The daemon sends the bytes, this process writes them: so the file is made with the rights of who runs the
command. Each byte is verified on its way; the file gets its name when it is whole and on the disk.
"""

import contextlib
import errno
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import click

from aspenfs import errors
from aspenfs.cli.aspen import Settings
from aspenfs.cli.client import Client
from aspenfs.cli.kv import json_option
from aspenfs.cli.output import (
    EXIT_CODES_HELP,
    EXIT_REFUSED,
    Failure,
    failures,
    local_time,
    print_json,
    size,
    utc,
)
from aspenfs.cli.reporter import Reporter
from aspenfs.runtime.backup.format import End, Header
from aspenfs.runtime.backup.reading import Checker, Progress, read
from aspenfs.runtime.disk import sync_directory

_WAIT_S = 120.0  # for the daemon's next word: it may have to catch up with its log first


@click.command(epilog=f"""\b
Examples:
  aspen backup /srv/backups/demo-2026-11-25.aspen
  aspen backup - | zstd | ssh vault 'cat > demo.aspen.zst'
  aspen backup --verify /srv/backups/demo-2026-11-25.aspen

\b
It is one moment of the whole cluster: everything that was written before the command was started, and
nothing that came later than its revision. Keys, files, members; but no private keys of nodes and no CA.
`aspen restore` makes a new cluster of it.
With --json: {{"file", "cluster", "cluster_id", "revision", "created", "rows", "blobs", "bytes", "lost"}};
"lost" are the chunks that could not be read: {{"chunk", "cause"}}.

{EXIT_CODES_HELP}""")
@click.argument("file", metavar="FILE")
@click.option("--verify", is_flag=True, help="Read FILE, which is there, from its first byte to its last.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@click.option("--stale", is_flag=True, help="What this node has, without asking the others: for when there "
              "is no majority.")
@click.option("--skip-damaged", is_flag=True, help="Go on when a chunk of a file can be read nowhere.")
@json_option
@click.pass_obj
def backup(settings: Settings, file: str, verify: bool, force: bool, stale: bool, skip_damaged: bool,
           as_json: bool) -> None:  # fmt: skip
    """Write the whole cluster into FILE (- is stdout), while it serves."""
    if verify and (force or stale or skip_damaged):
        raise click.UsageError("--verify only reads: it goes with no other option but --json")
    if file == "-" and as_json and not verify:
        raise click.UsageError("stdout is the backup: --json needs a FILE")
    with failures(), Reporter(quiet=as_json) as reporter:
        if verify:
            header, end, lost = _verify(file, reporter)
        else:
            header, end, lost = _take(settings, file, force, reporter, stale=stale, skip_damaged=skip_damaged)
    _tell(file, header, end, lost, verify, as_json)
    if lost:
        sys.exit(EXIT_REFUSED)


Outcome = tuple[Header, End, tuple[tuple[bytes, str], ...]]


def _take(settings: Settings, file: str, force: bool, reporter: Reporter, **params: bool) -> Outcome:
    reporter.say("waiting for the daemon")
    checker = Checker(file)
    with _written(file, force) as target:

        def item(piece: Mapping[str, Any]) -> None:
            target.write(piece["data"])
            checker.feed(piece["data"])
            _show(reporter, checker.progress, piece["rows_total"], piece["blobs_total"])

        timeout_s = max(settings.timeout_s, _WAIT_S)
        with Client(str(settings.directory.control_socket), timeout_s=timeout_s) as client:
            client.follow("backup", item, **params)
        header, end = checker.finish()
        reporter.say("waiting for the disk")
    progress = checker.progress
    assert progress is not None
    return header, end, progress.lost


def _verify(file: str, reporter: Reporter) -> Outcome:
    seen: list[Progress] = []

    def note(progress: Progress) -> None:
        seen[:] = [progress]
        _show(reporter, progress, progress.header.rows, 0)

    with opened(file) as source:
        header, end = read(source, file, progress=note)
    return header, end, seen[-1].lost


def _show(reporter: Reporter, progress: Progress | None, rows_total: int, blobs_total: int) -> None:
    if progress is None:
        return
    if progress.blobs or progress.lost:
        done = progress.blobs + len(progress.lost)
        reporter.say("chunks of files", done, blobs_total or None, f"{done:,}, {size(progress.blob_bytes)}")
    else:
        reporter.say("keys", progress.rows, max(rows_total, progress.rows), f"{progress.rows:,}")


def _tell(file: str, header: Header, end: End, lost: tuple[tuple[bytes, str], ...], verified: bool,
          as_json: bool) -> None:  # fmt: skip
    if as_json:
        print_json({"file": file, **described(header, end, lost)})
        return
    name, verb = "the backup" if file == "-" else file, "is whole" if verified else "written"
    for line in (
        f"{name} {verb}: {header.cluster}, revision {header.index}, {local_time(header.created_ns)}",
        f"  {end.rows:,} rows, {end.blobs:,} chunks, {size(end.row_bytes + end.blob_bytes)}",
    ):
        click.echo(line, err=file == "-")
    tell_lost(lost)


def described(header: Header, end: End, lost: tuple[tuple[bytes, str], ...]) -> dict[str, Any]:
    """A backup as --json has it."""
    return {
        "cluster": header.cluster,
        "cluster_id": header.cluster_id.hex(),
        "revision": header.index,
        "created": utc(header.created_ns),
        "rows": end.rows,
        "blobs": end.blobs,
        "bytes": end.row_bytes + end.blob_bytes,
        "lost": [{"chunk": digest.hex(), "cause": cause} for digest, cause in lost],
    }


def tell_lost(lost: tuple[tuple[bytes, str], ...]) -> None:
    """What is missing, on stderr."""
    if lost:
        click.echo(f"LOST: {len(lost)} chunks of files are not in it; reads of these fail:", err=True)
        for digest, cause in lost[:20]:
            click.echo(f"  {digest.hex()}: {cause}", err=True)
        if len(lost) > 20:
            click.echo(f"  … and {len(lost) - 20} more: see --json", err=True)


# --- files ---


def opened(file: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """FILE to be read, or stdin for -."""
    if file == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    return open(file, "rb")


@contextlib.contextmanager
def _written(file: str, force: bool) -> Generator[IO[bytes], None, None]:
    """FILE to be written: there, whole and durable, when the block ends without an error, and else not."""
    if file == "-":
        if sys.stdout.isatty():
            raise click.UsageError("a terminal is no place for a backup: name a FILE, or use a pipe")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(os.path.abspath(file))
    if _is_special(target):
        with open(target, "wb") as device:
            yield device
        return
    if target.exists() and not force:
        raise _exists(file)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as writing:
            yield writing
            writing.flush()
            os.fsync(descriptor)
        _give_name(draft, target, file, force)
        sync_directory(target.parent)
    finally:
        draft.unlink(missing_ok=True)


def _is_special(target: Path) -> bool:
    """A pipe, a tape: written to as it is."""
    try:
        return not stat.S_ISREG(target.stat().st_mode)
    except FileNotFoundError:
        return False


def _give_name(draft: Path, target: Path, file: str, force: bool) -> None:
    if force:
        draft.replace(target)
        return
    try:
        os.link(draft, target)  # unlike rename(2) it never replaces what came there meanwhile
    except FileExistsError:
        raise _exists(file) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if target.exists():  # a file system without hard links, as on a memory stick
            raise _exists(file) from None
        draft.rename(target)


def _exists(file: str) -> Failure:
    advice = "name another file, or use --force"
    return Failure(f"{file} is there already: nothing was written", advice=advice,
                   name=errors.AlreadyExists.__name__)  # fmt: skip


def reported(reporter: Reporter) -> Callable[[Progress], object]:
    """Tells `reporter` how far the reading of a backup is."""
    return lambda progress: _show(reporter, progress, progress.header.rows, 0)

#!/usr/bin/env python3
"""Print what is in a write-ahead log, frame by frame, changing nothing.

    tools/inspect_wal.py STATE/log/wal            what counts, segment by segment, and what is wrong
    tools/inspect_wal.py STATE/log/wal --frames   every frame; --all also what lies behind the end
    tools/inspect_wal.py STATE/log/wal --json     the same for programs, one object a line

The exit code is 1 when the log could not be opened as it is. Not for a log that is being written.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aspenfs.errors import StorageError
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.wal import verify
from aspenfs.runtime.wal_format import (
    FIRST_FRAME,
    Kind,
    RawFrame,
    decode_begin,
    decode_header,
    find_frames,
    read_frame,
    segment_number,
    walk_frames,
)


def frame_rows(disk: RealDisk, directory: str, *, everything: bool) -> Iterator[dict[str, Any]]:
    """One dict per frame, in file order; `chained` is False for what lies behind a hole."""
    for name in disk.list(directory):
        if segment_number(name) is None:
            continue
        file = disk.open(f"{directory}/{name}")
        try:
            try:
                header = decode_header(file, name)
            except StorageError as error:
                yield {"segment": name, "problem": str(error)}
                continue
            first = read_frame(file, header.tag, FIRST_FRAME)
            end = FIRST_FRAME
            if first is not None:
                for frame in walk_frames(file, header.tag, FIRST_FRAME, first.previous, header.size):
                    yield _row(name, frame, chained=True)
                    end = frame.end
            if everything:
                for frame in find_frames(file, header.tag, end, header.size):
                    yield _row(name, frame, chained=False)
        finally:
            file.close()


def _row(name: str, frame: RawFrame, *, chained: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "segment": name,
        "offset": frame.offset,
        "kind": Kind(frame.kind).name if frame.kind in set(Kind) else str(frame.kind),
        "term": frame.term,
        "index": frame.index,
        "bytes": len(frame.payload),
        "synced": frame.synced,
        "run": frame.run,
        "crc": f"{frame.crc:08x}",
        "chained": chained,
    }
    begin = decode_begin(frame)
    if begin is not None:
        row["after"] = f"segment {begin.previous_segment:x} offset {begin.previous_end}"
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="the log's directory, with its .wal files")
    parser.add_argument("--frames", action="store_true", help="print every frame")
    parser.add_argument("--all", action="store_true", help="also frames behind the end of the log")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    if not options.directory.is_dir():
        parser.error(f"{options.directory} is not a directory")
    directory = options.directory.resolve()
    disk = RealDisk(directory.parent)
    report = verify(disk, directory.name)
    rows = (
        frame_rows(disk, directory.name, everything=options.all)
        if options.frames or options.all
        else iter(())
    )
    if options.json:
        for row in rows:
            print(json.dumps(row))
        summary = report._asdict()
        summary["segments"] = [segment._asdict() for segment in report.segments]
        summary["hard_state"] = report.hard_state and [report.hard_state[0], report.hard_state[1].hex()]
        print(json.dumps(summary))
        return 1 if report.problem else 0
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    for segment in report.segments:
        print(
            f"{segment.name}  entries {segment.first_index}..{segment.last_index}  frames {segment.frames}  "
            f"bytes {segment.used_bytes} of {segment.size_bytes}"
        )
    if report.problem:
        print(f"PROBLEM  {report.problem}")
        return 1
    print(f"entries {report.first_index}..{report.last_index}  term and vote {report.hard_state}")
    print(f"not known to be synced: {report.unsynced_bytes} bytes  torn tail: {report.torn_bytes} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

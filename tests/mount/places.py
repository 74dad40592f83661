"""Where a POSIX test runs: in files/ of a mount, or in a plain ext4 directory that tells what is right."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.mount.mounting import ROOT


class Place(NamedTuple):
    """An empty directory of root's, mode 0755."""

    path: Path
    is_aspen: bool


def is_ext4(path: Path) -> bool:
    """By /proc/self/mountinfo: the longest mountpoint above the path."""
    best, kind = "", ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        mountpoint = fields.split()[4]
        if path.is_relative_to(mountpoint) and len(mountpoint) >= len(best):
            best, kind = mountpoint, rest.split()[0]
    return kind == "ext4"


@contextmanager
def ext4_directory() -> Iterator[Path]:
    """A directory on ext4: of the machine if it has one, else in an image on a loop device."""
    for base in (Path(tempfile.gettempdir()), Path("/var/tmp"), ROOT):
        if is_ext4(base.resolve()):
            path = Path(tempfile.mkdtemp(prefix="aspen-ext4-", dir=base.resolve()))
            path.chmod(0o755)
            try:
                yield path
            finally:
                shutil.rmtree(path)
            return
    with _ext4_image() as path:
        yield path


@contextmanager
def _ext4_image() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="aspen-ext4-") as base:
        os.chmod(base, 0o755)
        image, mountpoint = Path(base, "image"), Path(base, "mnt")
        mountpoint.mkdir()
        with image.open("wb") as file:
            file.truncate(4 << 30)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, timeout=60)
        subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)], check=True, timeout=30)
        try:
            yield mountpoint
        finally:
            subprocess.run(["umount", str(mountpoint)], check=True, timeout=30)

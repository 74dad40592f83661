"""The README's session, line by line, as a newcomer would type it."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.mount.mounting import Mount

README = Path(__file__).parents[2] / "README.md"
pytestmark = pytest.mark.mount


def steps() -> list[tuple[str, str]]:
    """(command, expected output) of each `$ ` line of the session."""
    # Those with the name of a host before the $ are for tests/mount/cluster/test_readme.py.
    blocks = re.findall(r"```console\n(\$ .*?)```", README.read_text(), re.DOTALL)
    found: list[tuple[str, str]] = []
    for line in "".join(blocks).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def test_the_session_prints_what_the_readme_says(own_mount: Mount) -> None:
    session = steps()
    assert len(session) > 15
    marker = "--- done ---"
    script = "".join(
        command.replace("/mnt/aspen", str(own_mount.mountpoint)) + f"\necho '{marker}'\n"
        for command, _ in session
    )
    environment = {**os.environ, **own_mount.environment}
    run = subprocess.run(
        ["bash", "-euo", "pipefail"],
        input=script,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    outputs = run.stdout.split(marker + "\n")
    for (command, expected), output in zip(session, outputs, strict=False):
        assert output == expected, f"{command}\n{run.stderr}"
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""

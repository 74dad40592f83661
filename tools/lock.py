#!/usr/bin/env python3
"""Writes the lock files from pyproject.toml: exact versions, with the hashes of all their files.

    tools/lock.py [--upgrade]       needs pip-tools (pip install pip-tools)

requirements.lock        what aspenfs runs with
requirements-build.lock  what its source-only packages (pyfuse3) and itself are built with
requirements-dev.lock    what the tests run with, beside the first

The hashes cover every wheel and source archive of a version, so a lock made here holds for each
Python from 3.11 and each machine. Where packages come from is the installing machine's business: a lock
with an address in it is refused.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN, BUILD, DEV = (ROOT / f"requirements{part}.lock" for part in ("", "-build", "-dev"))
# pyfuse3 has no wheels; these are its own build requirements (its pyproject.toml), and ours.
BUILD_REQUIREMENTS = [
    "setuptools>=78.1.1,<85",
    "setuptools-scm>=8,<11",
    "Cython>=3.1,<4",
    "wheel",
    "editables>=0.5,<1",
]


def compile_lock(lock: Path, requirements: list[str], constraints: list[Path], options: list[str]) -> None:
    """Resolves `requirements` into `lock`, at the versions that `constraints` have chosen already."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "requirements.in")
        source.write_text(
            "\n".join([*requirements, *(f"-c {path}" for path in constraints)]) + "\n", encoding="utf-8"
        )
        subprocess.run(
            [
                sys.executable,
                "-m",
                "piptools",
                "compile",
                "--quiet",
                "--generate-hashes",
                "--allow-unsafe",
                "--strip-extras",
                "--no-header",
                "--no-annotate",
                "--no-emit-index-url",
                "--no-emit-find-links",
                "--no-emit-trusted-host",
                "--no-emit-options",
                "--resolver=backtracking",
                *options,
                f"--output-file={lock}",
                str(source),
            ],
            check=True,
            cwd=ROOT,
            env={**os.environ, "CUSTOM_COMPILE_COMMAND": "tools/lock.py"},
        )
    text = "".join(line for line in lock.read_text(encoding="utf-8").splitlines(True) if line[0] not in "#\n")
    if found := re.search(r"https?:|file:|^-|index|find-links|@ ", text, re.MULTILINE):
        raise SystemExit(f"{lock}: holds an address or an option: {found[0]!r}")
    lock.write_text(f"# Written by tools/lock.py from pyproject.toml.\n{text}", encoding="utf-8")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    options = [option for option in sys.argv[1:] if option == "--upgrade"]
    run, dev = project["project"]["dependencies"], project["project"]["optional-dependencies"]["dev"]
    compile_lock(RUN, run, [], options)
    compile_lock(BUILD, [*project["build-system"]["requires"], *BUILD_REQUIREMENTS], [RUN], options)
    compile_lock(DEV, dev, [RUN, BUILD], options)


if __name__ == "__main__":
    main()

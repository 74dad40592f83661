"""The real `mount.aspen`, as a process: its refusals, their exit codes and their texts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aspenfs.cli.lock import StateLock
from aspenfs.cli.mount import main, user_allow_other
from aspenfs.cli.paths import StateDirectory
from aspenfs.cli.ready import READY_FD_VARIABLE
from aspenfs.fuse import mounts
from aspenfs.runtime import identity
from aspenfs.runtime.system import SystemEntropy

OK, USAGE, SYSTEM, MOUNT_FAILED = 0, 1, 2, 32  # mount(8)
NOBODY = 65534
COMMAND = [sys.executable, "-m", "aspenfs.cli.mount"]


class Place:
    """A mountpoint, and a state directory that holds the cluster `demo`, never started."""

    def __init__(self, base: Path) -> None:
        self.mountpoint = base / "mnt"
        self.state = StateDirectory(base / "state")
        self.mountpoint.mkdir()
        self.state.path.mkdir()
        identity.create(self.state.path, "demo", SystemEntropy())

    def mount(
        self, *arguments: str, prefix: tuple[str, ...] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs mount.aspen; nothing may be mounted by it, whatever it says."""
        environ = {**os.environ, "ASPEN_STATE_DIR": str(self.state.path), **variables}
        done = subprocess.run(
            [*prefix, *COMMAND, *arguments],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert mounts.find_mount(self.mountpoint) is None
        return done


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: NAME[:/SUBTREE], DIR"),
        (["demo"], "required: DIR"),
        (["demo", "MNT", "extra"], "unrecognized arguments: extra"),
        (["demo", "MNT", "-x"], "unrecognized arguments: -x"),
        (["demo", "MNT", "-o"], "argument -o: expected one argument"),
        (["de mo", "MNT"], "a cluster's name is"),
        (["demo:files", "MNT"], "the subtree starts with a slash"),
        (["demo", "MNT", "-o", "ro,nosiud"], "unknown option 'nosiud' (did you mean nosuid"),
        (["-o", "umask=8", "demo", "MNT"], "option umask is octal"),
        (["demo", "MNT", "-o", "ro", "-o", "state_dir=here"], "option state_dir is an absolute path"),
    ],
)
def test_wrong_usage_exits_with_1_and_says_what_is_wrong(
    place: Place, arguments: list[str], text: str
) -> None:
    done = place.mount(*(argument.replace("MNT", str(place.mountpoint)) for argument in arguments))
    assert done.returncode == USAGE
    assert done.stderr.startswith("mount.aspen: ")
    assert text in done.stderr
    assert done.stdout == ""


def test_help_exits_with_0_and_names_the_manual(place: Place) -> None:
    done = place.mount("--help")
    assert done.returncode == OK
    assert "man mount.aspen" in done.stdout


def test_missing_mountpoint_is_refused_with_the_command_that_makes_it(place: Place) -> None:
    missing = place.mountpoint / "nowhere"
    done = place.mount("demo", str(missing))
    assert done.returncode == MOUNT_FAILED
    assert f"{missing}: the mountpoint does not exist; `mkdir -p {missing}`" in done.stderr


def test_mountpoint_that_is_a_file_is_refused(place: Place) -> None:
    (place.mountpoint / "file").touch()
    done = place.mount("demo", str(place.mountpoint / "file"))
    assert done.returncode == MOUNT_FAILED
    assert "the mountpoint is not a directory" in done.stderr


def test_missing_state_directory_is_not_made_unasked(place: Place, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    done = place.mount("demo", str(place.mountpoint), "-o", f"state_dir={elsewhere}")
    assert done.returncode == MOUNT_FAILED
    assert f"{elsewhere}: holds no cluster; `aspen init` makes a new one" in done.stderr
    assert not elsewhere.exists()


def test_state_directory_without_a_cluster_gets_none_unasked(place: Place, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = place.mount("demo", str(place.mountpoint), "-o", f"state_dir={empty}")
    assert done.returncode == MOUNT_FAILED
    assert f"{empty}: holds no cluster" in done.stderr
    assert not list(empty.iterdir())


def test_cluster_of_another_name_is_not_mounted(place: Place) -> None:
    done = place.mount("prod", str(place.mountpoint), "-o", "create")
    assert done.returncode == MOUNT_FAILED
    assert f"{place.state.path}: holds the cluster 'demo', not 'prod'" in done.stderr


def test_identity_that_cannot_be_read_is_refused_with_the_way_out(place: Place) -> None:
    (place.state.path / identity.FILE_NAME).write_text("{")
    done = place.mount("demo", str(place.mountpoint), "-o", "create")
    assert done.returncode == MOUNT_FAILED
    assert "corrupt at offset 0" in done.stderr
    assert "restore it from a backup" in done.stderr


def test_state_directory_under_the_mount_is_refused(place: Place) -> None:
    hidden = place.mountpoint / "a" / "state"
    done = place.mount("demo", str(place.mountpoint), "-o", f"create,state_dir={hidden}")
    assert done.returncode == USAGE
    assert "would be hidden under the mount itself" in done.stderr
    assert not hidden.exists()


def test_state_directory_that_is_used_is_refused_with_the_pid_of_its_daemon(place: Place) -> None:
    with StateLock.acquire(place.state):
        done = place.mount("demo", str(place.mountpoint))
    assert done.returncode == MOUNT_FAILED
    assert f"in use by the daemon with pid {os.getpid()}" in done.stderr


def test_daemon_that_dies_at_its_start_is_reported_with_the_end_of_its_log(
    place: Place, tmp_path: Path
) -> None:
    # Python runs this in every process, so it ends the daemon before it can say anything.
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, sys\nif {READY_FD_VARIABLE!r} in os.environ:\n"
        "    sys.stderr.write('the sky fell\\n'); sys.stderr.flush(); os._exit(7)\n"
    )
    done = place.mount("demo", str(place.mountpoint), PYTHONPATH=str(tmp_path))
    assert done.returncode == MOUNT_FAILED
    assert "the daemon ended with exit code 7 before the mount answered" in done.stderr
    assert done.stderr.endswith(f"the end of {place.state.log}:\nthe sky fell\n")


def test_f_of_mount_8_means_fake_and_starts_nothing(place: Place, tmp_path: Path) -> None:
    caller = tmp_path / "mount"  # the kernel names a process after the script that it runs
    caller.write_text('#!/bin/sh\n"$@"\nexit $?\n')
    caller.chmod(0o755)
    done = place.mount("demo", str(place.mountpoint), "-f", prefix=(str(caller),))
    assert (done.returncode, done.stderr) == (OK, "")
    assert not place.state.log.exists()


@pytest.mark.mount
def test_machine_without_dev_fuse_is_told_how_to_get_it(place: Place) -> None:
    # In a mount namespace of its own, with an empty /dev.
    new_namespace = ("unshare", "-m") if os.geteuid() == 0 else ("unshare", "-r", "-m")
    prefix = (*new_namespace, "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "sh")
    done = place.mount("demo", str(place.mountpoint), prefix=prefix)
    assert done.returncode == SYSTEM
    assert "/dev/fuse is missing: load the kernel's module with `modprobe fuse`" in done.stderr


@pytest.mark.parametrize("option", ["dev", "suid"])
def test_user_who_is_not_root_cannot_have_dev_or_suid(
    place: Place, option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", str(place.mountpoint), "-o", f"{option},state_dir={place.state.path}"]
    assert run_as_nobody(arguments) == USAGE
    assert f"option {option}: only root may mount with it" in capfd.readouterr().err


@pytest.mark.parametrize(("owner", "mode"), [(65534, 0o700), (0, 0o770), (0, 0o702)])
def test_state_directory_that_others_may_change_is_refused(place: Place, owner: int, mode: int) -> None:
    place.state.path.mkdir(exist_ok=True)
    os.chown(place.state.path, owner, 0)
    place.state.path.chmod(mode)
    before = list(place.state.path.iterdir())
    done = place.mount("demo", str(place.mountpoint), "-o", f"create,state_dir={place.state.path}")
    assert done.returncode == SYSTEM
    assert "others may change the state directory" in done.stderr
    assert "chmod 700" in done.stderr
    assert list(place.state.path.iterdir()) == before


def test_state_directory_of_somebody_else_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    # Neither is ever created or changed: a user may not write to /etc.
    assert run_as_nobody(["demo", "/tmp", "-o", "state_dir=/etc"]) == SYSTEM
    assert "/etc: the state directory is not writable for you" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("user_allow_other\n", True),
        ("mount_max = 9\n  user_allow_other  \n", True),
        ("#user_allow_other\n", False),
        ("", False),
    ],
)
def test_fuse_conf_decides_whether_users_may_share_their_mounts(
    tmp_path: Path, text: str, allowed: bool
) -> None:
    configuration = tmp_path / "fuse.conf"
    configuration.write_text(text)
    assert user_allow_other(configuration) is allowed
    assert not user_allow_other(tmp_path / "missing")


def run_as_nobody(arguments: list[str]) -> int:
    """Exit code of mount.aspen's main in a process of a user who is not root."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            code = main(arguments)
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

"""The files of a node's credentials: made once, crash-safe, refused when they do not belong together."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aspenfs.errors import Corrupt, IdentityLost, InvalidArgument
from aspenfs.runtime import identity
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.peers import ca, credentials
from aspenfs.runtime.wal import Wal
from tests.runtime.peers.nodes import CLOCK, ENTROPY, make_authority, make_credentials

FILES = [identity.BORN_FILE, identity.CA_KEY_FILE, identity.CA_BUNDLE_FILE, identity.NODE_KEY_FILE,
         identity.NODE_CERTIFICATE_FILE]  # fmt: skip


def test_a_node_alone_becomes_the_first_of_a_cluster(tmp_path: Path) -> None:
    here = identity.create(tmp_path, "demo", ENTROPY)
    assert credentials.load(tmp_path) is None
    made = credentials.establish(tmp_path, CLOCK, ENTROPY)
    assert (made.name.cluster_id, made.name.node_id) == (here.cluster_id, here.node_id)
    assert made.name.born == identity.born(tmp_path)
    assert credentials.load(tmp_path) == made == credentials.establish(tmp_path, CLOCK, ENTROPY)
    assert identity.read(tmp_path) == here
    (authority,) = credentials.authorities(tmp_path)
    assert authority.fingerprint == ca.fingerprint(made.bundle[0])
    for name in FILES:
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600, name


def test_a_log_of_the_first_release_goes_on_with_a_birth_mark_beside_it(tmp_path: Path) -> None:
    here = identity.create(tmp_path, "demo", ENTROPY)
    wal = Wal.open(RealDisk(tmp_path), "wal", here.cluster_id, background=False)
    wal.append(1, 1, 1, b"entry")
    wal.close()
    credentials.establish(tmp_path, CLOCK, ENTROPY)
    wal = Wal.open(RealDisk(tmp_path), "wal", here.cluster_id, background=False)
    assert wal.last_index == 1
    wal.close()


@pytest.mark.parametrize("crash", range(len(FILES)))
def test_a_crash_while_they_are_made_leaves_nothing_that_the_next_start_cannot_finish(
    tmp_path: Path, crash: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity.create(tmp_path, "demo", ENTROPY)
    written: list[str] = []
    write = identity.write_file

    def crashing(path: Path, data: bytes) -> None:
        if len(written) == crash:
            raise OSError("the power is gone")
        written.append(path.name)
        write(path, data)

    monkeypatch.setattr(identity, "write_file", crashing)
    with pytest.raises(OSError, match="power"):
        credentials.establish(tmp_path, CLOCK, ENTROPY)
    monkeypatch.setattr(identity, "write_file", write)
    born = identity.born(tmp_path)
    made = credentials.establish(tmp_path, CLOCK, ENTROPY)
    assert credentials.load(tmp_path) == made
    assert born in (None, made.name.born)
    made.server_context()


def test_a_certificate_without_its_log_is_refused(tmp_path: Path) -> None:
    make_credentials(tmp_path / "n", make_authority(), 2)
    shutil.rmtree(tmp_path / "n" / "wal")
    with pytest.raises(IdentityLost, match="join again with a new ticket"):
        credentials.load(tmp_path / "n")
    identity.give_birth(tmp_path / "n", ENTROPY)  # another log took its place
    with pytest.raises(IdentityLost):
        credentials.load(tmp_path / "n")


@pytest.mark.parametrize("damage", [
    lambda directory, other: (directory / "node.crt").write_bytes(b"x"),
    lambda directory, other: (directory / "node.key").write_bytes(b"x"),
    lambda directory, other: (directory / "node.key").unlink(),
    lambda directory, other: (directory / "ca.crt").write_bytes(b"x"),
    lambda directory, other: (directory / "ca.crt").unlink(),
    lambda directory, other: (directory / "cluster.json").unlink(),
    lambda directory, other: shutil.copy(other / "node.key", directory / "node.key"),
    lambda directory, other: shutil.copy(other / "node.crt", directory / "node.crt"),
    lambda directory, other: shutil.copy(other / "ca.crt", directory / "ca.crt"),
    lambda directory, other: shutil.copy(other / "cluster.json", directory / "cluster.json"),
    lambda directory, other: (directory / "wal" / "born").write_bytes(b"x"),
])  # fmt: skip
def test_files_that_do_not_belong_together_are_corrupt(
    tmp_path: Path, damage: Callable[[Path, Path], object]
) -> None:
    directory, other = tmp_path / "one", tmp_path / "other"
    make_credentials(directory, make_authority(), 1)
    make_credentials(other, make_authority(), 2)
    damage(directory, other)
    with pytest.raises(Corrupt):
        credentials.load(directory)


def test_what_is_not_this_nodes_is_not_installed(tmp_path: Path) -> None:
    authority, foreign = make_authority(), make_authority()
    shown = make_credentials(tmp_path / "one", authority, 1)
    other = make_credentials(tmp_path / "two", authority, 2)
    before = {name: (tmp_path / "one" / name).read_bytes() for name in ("node.crt", "ca.crt", "node.key")}
    with pytest.raises(InvalidArgument):
        credentials.install(tmp_path / "one", other.certificate, [authority.certificate])
    with pytest.raises(InvalidArgument):
        credentials.install(tmp_path / "one", shown.certificate, [foreign.certificate])
    assert before == {name: (tmp_path / "one" / name).read_bytes() for name in before}


def test_two_cas_may_be_trusted_and_held(tmp_path: Path) -> None:
    one, two = make_authority(), make_authority()
    shown = make_credentials(tmp_path, one, 1)
    credentials.install(tmp_path, shown.certificate, [one.certificate, two.certificate])
    identity.write_file(tmp_path / identity.CA_KEY_FILE, ca.keys_pem([two.key, one.key]))
    held = [each.fingerprint for each in credentials.authorities(tmp_path)]
    assert held == [one.fingerprint, two.fingerprint]
    credentials.install(tmp_path, shown.certificate, [one.certificate])
    assert [each.fingerprint for each in credentials.authorities(tmp_path)] == [one.fingerprint]
    (tmp_path / identity.CA_KEY_FILE).write_bytes(b"x")
    with pytest.raises(Corrupt):
        credentials.authorities(tmp_path)

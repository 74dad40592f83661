"""Certificates of a running cluster: renewed in time, signed by whoever leads, or by another CA."""

from pathlib import Path

import pytest
import trio

from aspenfs import errors
from aspenfs.limits import CERTIFICATE_S
from aspenfs.runtime import identity
from aspenfs.runtime.peers import ca, credentials
from aspenfs.runtime.peers.authority import KEYS, RENEW, STATE, Row, read_row
from tests.runtime.peers.clusters import Member, Running, running_cluster
from tests.runtime.peers.nodes import in_trio, until


def keys_of(member: Member) -> list[bytes]:
    """Fingerprints of those in the file that the running node has taken up too."""
    held = [each.fingerprint for each in credentials.authorities(member.directory)]
    return held if tuple(held) == member.keeper.state().keys else []


def serial(member: Member) -> int:
    return member.network.credentials.certificate.serial_number


async def settled(running: Running) -> None:
    """All members are connected to each other."""
    everybody = set(running.members)
    for node, member in running.members.items():
        await until(lambda m=member, n=node: m.network.connected() == everybody - {n}, "connected")  # type: ignore[misc]


@in_trio
async def test_the_cluster_knows_its_ca_from_the_start(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        found = read_row(running.cluster.store)
        assert found is not None
        assert found[0] == Row(tuple(first.keeper.bundle), first.keeper.signing_fingerprint)
        await first.keeper.establish()
        assert read_row(running.cluster.store) == found


@in_trio
async def test_a_certificate_is_renewed_when_two_thirds_of_its_time_are_over(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        second = await running.add("second")
        await settled(running)
        before = {member.id: serial(member) for member in (first, second)}
        running.clock.ahead_ns = int(CERTIFICATE_S * 0.6) * 10**9
        running.tell()
        await trio.sleep(0.1)
        assert before == {member.id: serial(member) for member in (first, second)}
        running.clock.ahead_ns = int(CERTIFICATE_S * 0.7) * 10**9
        running.tell()
        # The first signs its own; the second, a learner, has the first sign it.
        await until(lambda: all(serial(member) != before[member.id] for member in (first, second)))
        for member in (first, second):
            shown = credentials.load(member.directory)
            assert shown is not None
            assert shown == member.network.credentials
            assert shown.name == member.network.credentials.name
            left_ns = ca.expires_ns(shown.certificate) - running.clock.time_ns()
            assert left_ns > int(CERTIFICATE_S * 0.9) * 10**9
        await settled(running)


@in_trio
async def test_nobody_gets_a_certificate_for_another(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        second = await running.add("second")
        await settled(running)
        der = await second.network.request(1, RENEW, ca.request(ca.new_key(), "node 1"), timeout_s=5)
        (certificate,) = ca.load_certificates([der])
        assert ca.name_of(certificate) == second.network.credentials.name
        for body in (None, b"", b"x" * 100, 7):
            with pytest.raises(errors.InvalidArgument):
                await second.network.request(1, RENEW, body, timeout_s=5)
        with pytest.raises(errors.NotSupported, match="cannot sign"):
            await first.network.request(second.id, RENEW, ca.request(ca.new_key(), "node 1"), timeout_s=5)


@in_trio
async def test_voters_get_the_key_of_the_ca_and_nobody_else(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        second = await running.add("second")
        await settled(running)
        with pytest.raises(errors.AccessDenied, match="not a voter"):
            await second.network.request(1, KEYS, None, timeout_s=5)
        assert not (second.directory / identity.CA_KEY_FILE).exists()
        running.cluster.voters.add(second.id)
        running.tell()
        await until(lambda: keys_of(second) == keys_of(first))
        assert (second.directory / identity.CA_KEY_FILE).stat().st_mode & 0o777 == 0o600
        running.cluster.leader = second.id
        joined = await running.join(await running.make_ticket(), "third")
        assert joined.identity.node_id in running.cluster.learners
        # Who is a voter no more gives it up, and goes on.
        running.cluster.leader = 1
        running.cluster.voters.remove(second.id)
        running.tell()
        await until(lambda: not second.keeper.state().keys)
        assert not (second.directory / identity.CA_KEY_FILE).exists()
        with pytest.raises(errors.NotSupported):
            second.keeper.check_signs()


@in_trio
async def test_the_last_key_is_not_given_up(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        second = await running.add("second")
        await settled(running)
        running.cluster.voters.clear()  # a configuration misunderstood
        running.tell()
        await trio.sleep(0.2)
        assert keys_of(first)
        running.cluster.voters.add(second.id)  # a voter that has no key either
        running.cluster.voters.discard(1)
        running.tell()
        await trio.sleep(0.2)
        assert keys_of(first)


@in_trio
async def test_an_expired_cluster_of_voters_heals_itself(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        second = await running.add("second", voter=True)
        await until(lambda: keys_of(second))
        directories = [member.directory for member in running.members.values()]
        for node in list(running.members):
            running.stop(node)
        # Certificates that ended an hour ago, as after a year in a cupboard.
        for directory in directories:
            (authority,) = credentials.authorities(directory)
            shown = credentials.load(directory)
            assert shown is not None
            key = credentials.node_key(directory)
            assert key is not None
            made_ns = running.clock.time_ns() - 7200 * 10**9
            old = ca.sign(authority, key.public_key(), shown.name, made_ns, 3600)
            credentials.install(directory, old, shown.bundle)
        for directory in directories:
            await running.start(directory)
        await settled(running)


# --- rotation ---


@in_trio
async def test_a_rotation_replaces_the_ca_under_running_links(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        second = await running.add("second", voter=True)
        third = await running.add("third")
        await settled(running)
        await until(lambda: keys_of(second))
        old = first.keeper.signing_fingerprint
        old_ticket = await running.make_ticket()
        lines: list[str] = []
        await first.keeper.rotate(lines.append)
        new = first.keeper.signing_fingerprint
        assert new != old
        for member in (first, second, third):
            assert member.keeper.state() == ((new,), new, (new,) if member is not third else ())
            assert credentials.load(member.directory) == member.network.credentials
        assert keys_of(first) == keys_of(second) == [new]
        assert not (third.directory / identity.CA_KEY_FILE).exists()
        await settled(running)
        assert lines[0] == "making a new CA"
        # Tickets name the CA that they were made under.
        with pytest.raises(errors.ForeignCluster, match="its CA was changed since"):
            await running.join(old_ticket, "fourth")
        await running.add("fourth")
        await settled(running)


@in_trio
async def test_a_rotation_waits_for_a_member_that_is_away_and_goes_on(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        second = await running.add("second")
        await settled(running)
        running.stop(second.id)
        lines: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.keeper.rotate, lines.append)
            await until(lambda: f"waiting for node {second.id} to trust the new CA" in lines)
            await trio.sleep(0.5)
            nursery.cancel_scope.cancel()
        found = read_row(running.cluster.store)
        assert found is not None
        assert len(found[0].certificates) == 2
        assert found[0].signing == ca.fingerprint(found[0].certificates[0])
        second = await running.start(second.directory)
        await settled(running)
        await first.keeper.rotate(lines.append)
        new = first.keeper.signing_fingerprint
        assert first.keeper.state().trusted == second.keeper.state().trusted == (new,)


@in_trio
async def test_a_rotation_whose_new_key_was_lost_begins_anew(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        second = await running.add("second", voter=True)
        await settled(running)
        await until(lambda: keys_of(second))
        found = read_row(running.cluster.store)
        assert found is not None
        lost = ca.new_authority("demo", running.clock.time_ns()).certificate
        await first.keeper._write_row(Row((*found[0].certificates, lost), found[0].signing), found[1])
        lines: list[str] = []
        await second.keeper.rotate(lines.append)
        assert "the new CA was lost with the node that made it: making another one" in lines
        new = first.keeper.signing_fingerprint
        assert new not in (ca.fingerprint(lost), found[0].signing)
        assert first.keeper.state().trusted == second.keeper.state().trusted == (new,)


@in_trio
async def test_of_two_rotations_at_once_one_gives_way(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        second = await running.add("second", voter=True)
        await settled(running)
        await until(lambda: keys_of(second))
        results: list[str] = []

        async def rotate(member: Member) -> None:
            try:
                await member.keeper.rotate(lambda line: None)
            except errors.Conflict:
                results.append("gave way")
            else:
                results.append("done")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(rotate, first)
            nursery.start_soon(rotate, second)
        assert "done" in results
        new = first.keeper.signing_fingerprint
        assert first.keeper.state() == second.keeper.state() == ((new,), new, (new,))
        await settled(running)


@in_trio
async def test_a_member_answers_about_its_state_and_nonsense_is_no_state(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        second = await running.add("second")
        await settled(running)
        answer = await second.network.request(1, STATE, None, timeout_s=5)
        assert answer == tuple(first.keeper.state())

        async def nonsense(peer: int, body: object) -> object:
            return (1, 2, 3)

        second.network.handlers[STATE] = nonsense
        assert not await first.keeper._fulfils(second.id, lambda state, voter: True)

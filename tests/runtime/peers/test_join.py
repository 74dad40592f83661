"""Joining with a ticket, over real sockets: who gets in, who does not, and what a lost answer does."""

import ssl
from pathlib import Path

import pytest
import trio

from aspenfs import errors
from aspenfs.limits import JOIN_FAILURES_MAX, MEMBERS_MAX
from aspenfs.runtime import identity
from aspenfs.runtime.peers import ca, credentials, frames, tickets
from aspenfs.runtime.peers.admission import Failures
from aspenfs.runtime.peers.frames import Type
from tests.kv.subject import FakeClock
from tests.runtime.peers.clusters import Row, running_cluster
from tests.runtime.peers.nodes import ENTROPY, in_trio, until


@in_trio
async def test_a_node_with_a_ticket_becomes_a_learner_with_a_certificate(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        ticket = tickets.decode((await running.make_ticket()).encode())
        joined = await running.join(ticket, "second")
        node = joined.identity.node_id
        assert joined.identity == (ticket.cluster_id, "demo", node)
        assert node > 1
        assert running.cluster.learners == {node}
        shown = credentials.load(tmp_path / "second")
        assert shown is not None
        assert shown.name == (ticket.cluster_id, node, identity.born(tmp_path / "second"))
        assert set(joined.members) == {1, node}
        address, born = f"127.0.0.1:{first.network.ports[0]}", first.network.credentials.name.born
        assert joined.members[1] == ((address,), born, "member")
        assert running.cluster.table()[node] == Row("second", ("127.0.0.1:1",), "member", shown.name.born)
        assert not (tmp_path / "second" / identity.CA_KEY_FILE).exists()
        second = await running.start(tmp_path / "second")
        await until(lambda: first.network.connected() == {node} and second.network.connected() == {1})


@in_trio
async def test_a_member_that_is_not_the_leader_passes_the_candidate_on(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        second = await running.add("second")
        await until(lambda: second.network.connected())
        ticket = await running.make_ticket(f"127.0.0.1:{second.network.ports[0]}")
        joined = await running.join(ticket, "third")
        assert joined.identity.node_id in running.cluster.learners
        assert first.id == 1


@in_trio
async def test_a_ticket_is_good_once(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        ticket = await running.make_ticket()
        joined = await running.join(ticket, "second")
        says = rf"node {joined.identity.node_id} has joined.*aspen ticket create"
        with pytest.raises(errors.TicketUsed, match=says):
            await running.join(ticket, "third")
        assert not (tmp_path / "third" / identity.FILE_NAME).exists()
        assert running.cluster.admissions == 1


@in_trio
async def test_of_many_that_try_one_ticket_at_once_one_gets_in(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        ticket = await running.make_ticket()
        results: list[object] = []

        async def attempt(name: str) -> None:
            try:
                results.append(await running.join(ticket, name))
            except errors.TicketUsed:
                results.append(None)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(attempt, f"node{number}")
        assert len([each for each in results if each is not None]) == 1
        assert running.cluster.admissions == 1


@in_trio
async def test_a_ticket_that_is_over_or_was_withdrawn_is_refused(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        ticket = await running.make_ticket(ttl_s=60)
        running.clock.ahead_ns = 61 * 10**9
        with pytest.raises(errors.TicketExpired, match="aspen ticket create"):
            await running.join(ticket, "second")
        late = ticket._replace(expires_s=ticket.expires_s + 600)  # the joiner's clock, or its text, is wrong
        with pytest.raises(errors.TicketExpired, match="aspen ticket create"):
            await running.join(late, "second")
        withdrawn = await running.make_ticket()
        await running.cluster.store.txn([], [tickets.withdraw(withdrawn.hash)])
        with pytest.raises(errors.TicketUnknown, match="aspen ticket create"):
            await running.join(withdrawn, "second")
        forged = withdrawn._replace(secret=b"x" * tickets.SECRET_BYTES)
        with pytest.raises(errors.TicketUnknown):
            await running.join(forged, "second")
        assert running.cluster.admissions == 0


@in_trio
async def test_a_lost_answer_is_given_again_to_the_same_node_only(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        ticket = await running.make_ticket()
        joined = await running.join(ticket, "second")
        for name in (identity.FILE_NAME, identity.NODE_CERTIFICATE_FILE, identity.CA_BUNDLE_FILE):
            (tmp_path / "second" / name).unlink()  # as if the answer had not come
        again = await running.join(ticket, "second")
        assert again == joined
        assert credentials.load(tmp_path / "second") is not None
        for name in (identity.FILE_NAME, identity.NODE_CERTIFICATE_FILE, identity.NODE_KEY_FILE):
            (tmp_path / "second" / name).unlink()  # another key: another node
        with pytest.raises(errors.TicketUsed):
            await running.join(ticket, "second")
        assert running.cluster.admissions == 1


@in_trio
async def test_a_leader_that_is_lost_after_the_commit_loses_nobody(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        running.cluster.fail_after_commit = True
        joined = await running.join(await running.make_ticket(), "second")
        assert running.cluster.admissions == 1
        assert running.cluster.learners == {joined.identity.node_id}


@in_trio
async def test_without_a_leader_the_cause_is_named(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        ticket = await running.make_ticket()
        running.cluster.leader = 0
        with pytest.raises(errors.NoQuorum, match="no leader just now"):
            await running.join(ticket, "second")
        running.cluster.leader = 99  # a leader that this node cannot reach
        with pytest.raises(errors.NoQuorum):
            await running.join(ticket, "second")


@in_trio
async def test_a_leader_that_cannot_sign_admits_nobody(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        ticket = await running.make_ticket()
        second = await running.add("second")  # a learner: it has no key
        running.cluster.leader = second.id
        await until(lambda: second.network.connected())
        with pytest.raises(errors.NotSupported, match="cannot sign"):
            await running.join(ticket, "third")
        assert running.cluster.admissions == 1


# --- who answers is not who should ---


@in_trio
async def test_the_secret_is_not_told_to_who_does_not_have_the_cas_key(tmp_path: Path) -> None:
    async with running_cluster(tmp_path / "a") as ours, running_cluster(tmp_path / "b") as theirs:
        await ours.found()
        other = await theirs.found()
        ticket = await ours.make_ticket(f"127.0.0.1:{other.network.ports[0]}")
        asked: list[int] = []
        answer = other.network.strangers
        assert answer is not None

        async def impostor(kind: int, payload: bytes, host: str) -> bytes:
            asked.append(kind)
            return await answer(kind, payload, host)

        other.network.strangers = impostor
        says = r"does not have the CA of the ticket.*aspen ticket create"
        with pytest.raises(errors.ForeignCluster, match=says):
            await ours.join(ticket, "second")
        assert asked == [Type.AUTHORITIES]

        # One that shows the right CA, which anybody may have seen, but has no certificate of it.
        right = ours.members[1].network.credentials.bundle

        async def liar(kind: int, payload: bytes, host: str) -> bytes:
            asked.append(kind)
            return frames.encode_authorities(ticket.cluster_id, map(ca.der, right))

        other.network.strangers = liar
        asked.clear()
        with pytest.raises(errors.PeerUnreachable, match="its certificate is refused"):
            await ours.join(ticket, "second")
        assert asked == [Type.AUTHORITIES]


@in_trio
async def test_a_ticket_of_another_cluster_with_the_same_ca_is_refused(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        ticket = await running.make_ticket()
        with pytest.raises(errors.ForeignCluster, match="no node of the ticket's cluster"):
            await running.join(ticket._replace(cluster_id=b"o" * 16), "second")


@in_trio
async def test_addresses_that_do_not_answer_are_passed_over_and_named(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        good = f"127.0.0.1:{first.network.ports[0]}"
        says = r"127\.0\.0\.1:1: Connection refused; 127\.0\.0\.1:2: Connection refused"
        with pytest.raises(errors.PeerUnreachable, match=says):
            await running.join(await running.make_ticket("127.0.0.1:1", "127.0.0.1:2"), "second")
        await running.join(await running.make_ticket("127.0.0.1:1", good), "second")


@in_trio
async def test_something_else_at_the_address_is_named(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        with trio.socket.socket() as other:
            await other.bind(("127.0.0.1", 0))
            other.listen(5)
            ticket = await running.make_ticket(f"127.0.0.1:{other.getsockname()[1]}")

            async def speak() -> None:
                sock, _ = await other.accept()
                with sock:
                    await sock.send(b"220 mail.example ESMTP\r\n")
                    await sock.recv(1000)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(speak)
                with pytest.raises(errors.PeerUnreachable, match="no TLS as it is spoken here: wrong"):
                    await running.join(ticket, "second")


# --- what is asked for ---


@in_trio
async def test_a_directory_that_is_a_node_already_is_left_alone(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        before = {path: path.read_bytes() for path in (tmp_path / "n1").rglob("*") if path.is_file()}
        with pytest.raises(errors.AlreadyExists, match="choose another"):
            await running.join(await running.make_ticket(), "n1")
        assert before == {path: path.read_bytes() for path in (tmp_path / "n1").rglob("*") if path.is_file()}
        (tmp_path / "old" / "state").mkdir(parents=True)
        with pytest.raises(errors.AlreadyExists):
            await running.join(await running.make_ticket(), "old")


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "a\n", "a,b"])
@in_trio
async def test_a_name_or_an_address_that_cannot_be_is_refused_at_both_ends(tmp_path: Path, name: str) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        ticket = await running.make_ticket()
        with pytest.raises(errors.InvalidArgument, match="node name"):
            await running.join(ticket, name or "")
        csr = ca.request(ca.new_key(), "x")
        wish = frames.Join(ticket.cluster_id, ticket.secret, csr, b"b" * 16, name, ("127.0.0.1:1",), True)
        with pytest.raises(errors.InvalidArgument, match="node name"):
            await first.reception.answer(Type.JOIN, frames.encode_join(wish)[5:], "host")
        wish = wish._replace(name="good", addresses=("not an address",))
        with pytest.raises(errors.InvalidArgument, match="address"):
            await first.reception.answer(Type.JOIN, frames.encode_join(wish)[5:], "host")
        wish = wish._replace(addresses=("a",), request=b"not a request")
        with pytest.raises(errors.InvalidArgument, match="signing request"):
            await first.reception.answer(Type.JOIN, frames.encode_join(wish)[5:], "host")
        assert running.cluster.admissions == 0


@in_trio
async def test_a_full_cluster_takes_nobody(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        for node in range(2, MEMBERS_MAX + 1):
            running.cluster.write(node, Row("n", ("127.0.0.1:1",), "member", b""))
        ticket = await running.make_ticket()
        with pytest.raises(errors.InvalidArgument, match="aspen member remove"):
            await running.join(ticket, "one-too-many")
        running.cluster.write(2, Row("n", ("127.0.0.1:1",), "removed", b""))
        await running.join(ticket, "one-too-many")


# --- wrong secrets ---


@in_trio
async def test_wrong_tickets_in_a_row_have_to_wait(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        first.reception._failures._clock = clock = FakeClock()
        ticket = await running.make_ticket()
        for number in range(JOIN_FAILURES_MAX):
            with pytest.raises(errors.TicketUnknown):
                await running.join(ticket._replace(secret=bytes([number]) * 20), "second")
        says = r"too many wrong tickets from 127\.0\.0\.1: try again in [1-6] s"
        with pytest.raises(errors.PeerRefused, match=says):
            await running.join(ticket, "second")
        clock.now_ns += 7 * 10**9
        await running.join(ticket, "second")


def test_failures_are_forgiven_in_time_and_bounded_in_memory() -> None:
    class Clock:
        now_ns = 0

        def time_ns(self) -> int:
            return 0

        def monotonic_ns(self) -> int:
            return self.now_ns

    clock = Clock()
    failures = Failures(clock)
    for _ in range(JOIN_FAILURES_MAX + 5):
        failures.note("a")
    failures.check("b")
    with pytest.raises(errors.Overloaded):
        failures.check("a")
    clock.now_ns = 1000 * 10**9
    failures.check("a")
    for number in range(5000):
        failures.note(str(number))
    assert len(failures._until) <= 1024


@in_trio
async def test_what_else_strangers_say_is_refused(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        first = await running.found()
        for kind in range(32):
            for payload in (b"", b"\xc0", b"\x92\xaaaspen-peer\x91\x01", b"\x92\xaaaspen-peer\x91\x07"):
                if kind == Type.AUTHORITIES and payload.endswith(b"\x91\x01"):
                    continue
                with pytest.raises((errors.ProtocolError, errors.NotSupported, errors.Overloaded)):
                    await first.reception.answer(kind, payload, "host")


@in_trio
async def test_a_member_cannot_pass_on_what_is_no_candidate(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as running:
        await running.found()
        second = await running.add("second")
        await until(lambda: second.network.connected())
        for body in (None, (), (b"",) * 6, [b"h", b"r", b"b", "n", [1], True], {"a": 1}):
            with pytest.raises(errors.InvalidArgument):
                await second.network.request(1, "member.join", body, timeout_s=5)


def test_the_joiner_does_not_trust_just_anybody() -> None:
    assert credentials.client_context([]).verify_mode == ssl.CERT_NONE  # to ask for the CAs only
    authority = ca.new_authority("demo", 10**18)
    assert credentials.client_context([authority.certificate]).verify_mode == ssl.CERT_REQUIRED
    assert ENTROPY.random_bytes(1) is not None

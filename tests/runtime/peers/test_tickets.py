"""Tickets: the text, and what the cluster keeps of it."""

import base64
import hashlib

import msgpack
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from aspenfs.errors import InvalidArgument, TicketMalformed
from aspenfs.kv.local import LocalStore
from aspenfs.limits import TICKET_KEPT_S, TICKET_TTL_S_MAX, TICKETS_MAX
from aspenfs.runtime.peers import tickets
from aspenfs.runtime.peers.tickets import Ticket
from tests.kv.subject import FakeClock, FakeEntropy

CLUSTER, FINGERPRINT, NOW_NS = b"c" * 16, b"f" * 32, 1_700_000_000_000_000_000


def make(ttl_s: int = 600, *addresses: str, now_ns: int = NOW_NS) -> Ticket:
    places = addresses or ("node1.example:7420", "[2001:db8::7]:7421")
    return tickets.new(CLUSTER, "demo", places, FINGERPRINT, ttl_s, now_ns, ENTROPY)


ENTROPY = FakeEntropy()


def test_a_ticket_is_read_back_from_its_text_however_a_mail_breaks_it() -> None:
    ticket = make()
    text = ticket.encode()
    assert text.startswith("aspen1-")
    assert len(text) < 250
    assert tickets.decode(text) == ticket
    broken = "\n  ".join(text[place:place + 40] for place in range(0, len(text), 40))
    assert tickets.decode(f" {broken}\n") == ticket


@given(data=st.data())
def test_a_ticket_with_a_character_changed_missing_or_added_is_refused(data: st.DataObject) -> None:
    text = TEXT
    place = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(st.characters(codec="ascii", categories=["L", "N", "P"]))
    changed = data.draw(st.sampled_from([
        text[:place] + character + text[place + 1:], text[:place], text[:place] + text[place + 1:],
        text[:place] + character + text[place:],
    ]))  # fmt: skip
    try:
        # The last character has bits that count for nothing.
        assert tickets.decode(changed) == tickets.decode(text)
    except TicketMalformed:
        return
    assert changed[:-1] == text[:-1] or changed == text


TEXT = make().encode()


@given(st.text(max_size=100) | st.binary(max_size=100).map(lambda data: "aspen1-" + _sealed(data)))
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(TicketMalformed):
        tickets.decode(text)


def _sealed(data: bytes) -> str:
    checksum = hashlib.sha256(data).digest()[:4]
    return base64.urlsafe_b64encode(data + checksum).rstrip(b"=").decode()


@pytest.mark.parametrize(("place", "value"), [
    (0, b"c"), (0, "c" * 16), (1, ""), (1, "a b"), (1, b"demo"), (2, ()), (2, ("a b",)), (2, (7,)), (2, "a"),
    (2, ("a",) * 100), (3, b"f"), (4, b"short"), (5, -1), (5, "1"), (5, 1 << 60),
])  # fmt: skip
def test_a_ticket_with_a_field_that_is_no_such_thing_is_refused(place: int, value: object) -> None:
    fields = list(make())
    fields[place] = value
    with pytest.raises(TicketMalformed):
        tickets.decode("aspen1-" + _sealed(msgpack.packb(fields)))


def test_a_ticket_is_bounded_in_time_and_has_addresses() -> None:
    for ttl_s in (0, -1, TICKET_TTL_S_MAX + 1):
        with pytest.raises(InvalidArgument):
            make(ttl_s)
    with pytest.raises(InvalidArgument):
        make(600, "not an address")
    assert make(60).expires_s == NOW_NS // 10**9 + 60


def test_the_cluster_keeps_a_hash_that_no_other_cluster_has_for_that_secret() -> None:
    ticket = make()
    assert ticket.secret not in tickets.key_of(ticket.hash)
    assert ticket.hash != ticket._replace(cluster_id=b"d" * 16).hash
    assert len({make().secret for _ in range(100)}) == 100


# --- rows ---


def test_of_two_that_use_a_ticket_at_once_one_succeeds() -> None:
    async def main() -> None:
        store, ticket = LocalStore(FakeClock(), FakeEntropy(), trio.Event), make()
        assert (await store.txn(*tickets.create(store, ticket, NOW_NS))).succeeded
        found = tickets.find(store, ticket.hash)
        assert found is not None
        assert found[0] == tickets.Known(ticket.expires_s * 10**9, NOW_NS)
        both = [tickets.use(ticket.hash, *found, node=node, born=b"b", key=b"k") for node in (5, 6)]
        assert [(await store.txn(*use)).succeeded for use in both] == [True, False]
        used = tickets.find(store, ticket.hash)
        assert used is not None
        assert used[0] == found[0]._replace(node=5, born=b"b", key=b"k")
        assert not (await store.txn(*tickets.create(store, ticket, NOW_NS))).succeeded

    trio.run(main)


def test_old_rows_are_forgotten_when_a_ticket_is_made_and_open_ones_are_bounded() -> None:
    async def main() -> None:
        store = LocalStore(FakeClock(), FakeEntropy(), trio.Event)
        old = make(60)
        await store.txn(*tickets.create(store, old, NOW_NS))
        late = NOW_NS + (60 + TICKET_KEPT_S) * 10**9
        await store.txn(*tickets.create(store, make(60, now_ns=late), late))
        assert tickets.find(store, old.hash) is not None
        later = late + 10**9
        newer = make(60, now_ns=later)
        await store.txn(*tickets.create(store, newer, later))
        assert tickets.find(store, old.hash) is None
        assert len(list(tickets.all_known(store))) == 2
        await store.txn([], [tickets.withdraw(newer.hash)])
        assert tickets.find(store, newer.hash) is None
        for _ in range(TICKETS_MAX - 1):
            await store.txn(*tickets.create(store, make(60, now_ns=later), later))
        with pytest.raises(InvalidArgument, match="are open"):
            tickets.create(store, make(60, now_ns=later), later)

    trio.run(main)

"""The overlay: what is staged hides the base until the base has it."""

from aspenfs.kv.memory import MemoryState
from aspenfs.kv.overlay import Overlay
from aspenfs.kv.state import Effect
from aspenfs.kv.types import NO_ATTRIBUTES, Record

Shown = dict[bytes, bytes]


def record(value: bytes) -> Record:
    return Record(value, 1, 1, 1, 0, 0, NO_ATTRIBUTES)


def effect(key: bytes, value: bytes | None) -> Effect:
    return key, None if value is None else record(value)


def overlay_over(*keys: bytes) -> tuple[MemoryState, Overlay]:
    base = MemoryState()
    base.apply([effect(key, b"base") for key in keys])
    return base, Overlay(base)


def shown(overlay: Overlay, start: bytes = b"", end: bytes = b"", *, reverse: bool = False) -> Shown:
    return {key: found.value for key, found in overlay.items(start, end, reverse=reverse)}


def test_staged_effects_hide_the_base_and_the_newest_wins() -> None:
    _, overlay = overlay_over(b"a", b"b")
    overlay.stage(1, [effect(b"a", b"1"), effect(b"b", None), effect(b"c", b"1")])
    overlay.stage(2, [effect(b"a", b"2")])
    assert overlay.get(b"a") == record(b"2")
    assert overlay.get(b"b") is None
    assert shown(overlay) == {b"a": b"2", b"c": b"1"}
    assert list(shown(overlay, reverse=True)) == [b"c", b"a"]
    assert shown(overlay, b"b", b"c") == {}


def test_settling_shows_the_base_again_but_keeps_what_was_staged_later() -> None:
    base, overlay = overlay_over(b"a")
    overlay.stage(1, [effect(b"a", b"1"), effect(b"b", b"1")])
    overlay.stage(2, [effect(b"a", None)])
    overlay.stage(3, [effect(b"a", b"3")])
    base.apply(overlay.pending(1))
    overlay.settle(1)
    assert shown(overlay) == {b"a": b"3", b"b": b"1"}
    base.apply(overlay.pending(2))
    overlay.settle(2)
    assert overlay.get(b"a") == record(b"3"), "a deletion settled does not uncover the base"
    base.apply(overlay.pending(3))
    overlay.settle(3)
    assert base.get(b"a") == record(b"3")
    assert overlay.bytes == 0


def test_settling_in_steps_drops_no_deletion_that_the_base_does_not_have() -> None:
    """The base has a batch before its first step is settled."""
    base, overlay = overlay_over(b"a")
    overlay.stage(1, [effect(b"a", None)])
    overlay.stage(2, [effect(b"a", b"2")])
    overlay.stage(3, [effect(b"a", None)])
    base.apply(overlay.pending(2))
    overlay.settle(1)
    assert overlay.get(b"a") is None
    overlay.settle(2)
    assert overlay.get(b"a") is None
    assert shown(overlay) == {}


def test_pending_is_the_newest_of_each_key_up_to_an_index_in_key_order() -> None:
    _, overlay = overlay_over()
    overlay.stage(1, [effect(b"b", b"1"), effect(b"a", b"1")])
    overlay.stage(2, [effect(b"a", None)])
    overlay.stage(3, [effect(b"b", b"3")])
    assert overlay.pending(2) == [effect(b"a", None), effect(b"b", b"1")]
    assert overlay.pending(9) == [effect(b"a", None), effect(b"b", b"3")]
    assert overlay.pending(0) == []


def test_discarding_uncovers_what_was_staged_before_and_names_what_was_lost() -> None:
    _, overlay = overlay_over(b"a", b"b")
    overlay.stage(1, [effect(b"a", b"1")])
    held = overlay.bytes
    overlay.stage(2, [effect(b"a", b"2"), effect(b"b", None)])
    overlay.stage(3, [effect(b"a", b"3"), effect(b"c", b"3")])
    assert overlay.discard_after(1) == [effect(b"a", b"3"), effect(b"b", None), effect(b"c", b"3")]
    assert shown(overlay) == {b"a": b"1", b"b": b"base"}
    assert overlay.bytes == held
    overlay.stage(2, [effect(b"c", b"again")])
    assert shown(overlay) == {b"a": b"1", b"b": b"base", b"c": b"again"}


def test_bytes_follow_what_is_held() -> None:
    _, overlay = overlay_over()
    assert overlay.bytes == 0
    overlay.stage(1, [effect(b"a", bytes(10_000))])
    overlay.stage(2, [effect(b"a", bytes(10_000))])
    assert 20_000 <= overlay.bytes < 21_000, "the older value is held until it is settled"
    overlay.settle(1)
    assert 10_000 <= overlay.bytes < 10_500


class Snapshots:
    """A base whose walks show the state of the moment when they began, as a database's do."""

    def __init__(self) -> None:
        self.state = MemoryState()
        self.get = self.state.get

    def items(self, start: bytes, end: bytes, *, reverse: bool = False):  # type: ignore[no-untyped-def]
        return iter(list(self.state.items(start, end, reverse=reverse)))


def test_a_walk_sees_keys_that_are_settled_under_it() -> None:
    """They leave the overlay for a base that a walk begun earlier would not show them in."""
    for reverse in (False, True):
        base = Snapshots()
        overlay = Overlay(base)
        keys = [b"%03d" % number for number in range(300)]
        for index, key in enumerate(keys, 1):
            overlay.stage(index, [effect(key, b"x")])
        seen = []
        for place, (key, _) in enumerate(overlay.items(b"", b"", reverse=reverse)):
            seen.append(key)
            if place % 50 == 0:
                upto = (place + 1) * 300 // 251
                base.state.apply(overlay.pending(upto))
                overlay.settle(upto)
        assert seen == (keys[::-1] if reverse else keys)


def test_a_key_staged_again_after_it_was_settled_is_shown_once() -> None:
    for reverse in (False, True):
        base, overlay = overlay_over()
        overlay.stage(1, [effect(b"a", b"1"), effect(b"b", b"1")])
        overlay.stage(2, [effect(b"c", b"2")])
        list(overlay.items(b"", b""))
        base.apply(overlay.pending(1))
        overlay.settle(1)
        overlay.stage(3, [effect(b"a", b"3")])
        assert [key for key, _ in overlay.items(b"", b"", reverse=reverse)].count(b"a") == 1


def test_the_order_of_keys_does_not_grow_without_bound() -> None:
    _, overlay = overlay_over()
    for index in range(1, 20_000):
        overlay.stage(index, [effect(b"%d" % index, b"")])
        overlay.settle(index - 5)
        if index % 100 == 0:
            assert len(shown(overlay)) == 5
    assert len(overlay._order) + len(overlay._fresh) < 3_000

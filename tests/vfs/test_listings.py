"""Positions in directories: from each of them the rest is listed once, whatever comes or is forgotten."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import trio
import trio.testing

from aspenfs.vfs import listings
from aspenfs.vfs.listings import FIRST, Listings, place_of
from aspenfs.vfs.tree import Tree

NODE = 1


class Flat(Tree):
    """Directories of nothing but names."""

    def __init__(self, *names: bytes) -> None:
        self.of: dict[int, set[bytes]] = {NODE: set(names)}
        self.passes = 0

    def listing_version(self, node: int) -> int | None:
        return hash(frozenset(self.of[node]))

    def list_names(self, node: int, behind: Any, limit: int) -> tuple[Sequence[bytes], Any]:
        self.passes += behind is None
        names = sorted(name for name in self.of[node] if behind is None or name > behind)[:limit]
        return names, names[-1] if len(names) == limit else None


def many(count: int) -> list[bytes]:
    return [b"name-%d" % number for number in range(count)]


async def rest(kept: Listings, tree: Tree, position: int = 0, limit: int = 10) -> list[bytes]:
    names: list[bytes] = []
    while batch := await kept.after(tree, NODE, position, limit):
        assert len(batch) <= limit
        names += [name for name, _ in batch]
        position = batch[-1][1]
    return names


def test_every_name_is_given_once_in_the_order_of_places() -> None:
    async def main() -> None:
        tree = Flat(*many(1000))
        names = await rest(Listings(), tree)
        assert sorted(names) == sorted(tree.of[NODE])
        assert [place_of(name) for name in names] == sorted(map(place_of, names))
        assert await rest(Listings(), Flat()) == []

    trio.run(main)


def test_positions_are_positive_and_fit_63_bits() -> None:
    async def main() -> None:
        batch = await Listings().after(Flat(*many(5000)), NODE, 0, 5000)
        positions = [position for _, position in batch]
        assert positions == sorted(set(positions))
        assert positions[0] >= FIRST
        assert positions[-1] < 1 << 63

    trio.run(main)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("forget", [False, True])
def test_what_stays_is_given_once_though_names_come_and_go(seed: int, forget: bool) -> None:
    """Several readers, each with its own pace; in between everything that is kept may be thrown away."""

    async def main() -> None:
        noise = random.Random(seed)
        staying = set(many(200))
        tree = Flat(*staying)
        kept = Listings(names_max=150, stretch_max=64, step=16)
        readers: list[list[bytes]] = [[] for _ in range(3)]
        positions = [0, 0, 0]
        others: set[bytes] = set()
        running = [0, 1, 2]
        while running:
            reader = noise.choice(running)
            source = Listings(stretch_max=64, step=16) if forget else kept
            batch = await source.after(tree, NODE, positions[reader], noise.randrange(1, 20))
            if not batch:
                running.remove(reader)
                continue
            taken = batch[: noise.randrange(1, len(batch) + 1)]
            readers[reader] += [name for name, _ in taken]
            positions[reader] = taken[-1][1]
            others ^= {b"other-%d" % noise.randrange(500) for _ in range(5)}
            tree.of[NODE] = staying | others
        for names in readers:
            assert len(set(names)) == len(names)
            assert staying <= set(names)

    trio.run(main)


def test_a_position_whose_name_is_gone_goes_on_behind_it() -> None:
    async def main() -> None:
        tree = Flat(*many(100))
        kept = Listings()
        batch = await kept.after(tree, NODE, 0, 50)
        tree.of[NODE] -= {name for name, _ in batch}
        assert len(await rest(Listings(), tree, batch[-1][1])) == 50
        # Those that are kept are given, and found to be gone by who looks them up.
        assert len(await rest(kept, tree, batch[20][1])) == 29 + 50
        assert len(await rest(Listings(), tree, batch[20][1])) == 50

    trio.run(main)


def test_who_starts_sees_what_is_there_also_behind_what_others_read_before() -> None:
    async def main() -> None:
        tree = Flat(*many(100))
        kept = Listings()
        early = await kept.after(tree, NODE, 0, 10)
        await kept.after(tree, NODE, early[-1][1], 10)
        tree.of[NODE] |= {b"new-%d" % number for number in range(100)}
        late = await kept.after(tree, NODE, 0, 10)
        # The early one goes on, and so does the late one, from the same kept names.
        assert len(set(await rest(kept, tree, early[-1][1])) & set(many(100))) == 90
        assert set(await rest(kept, tree, late[-1][1])) | {name for name, _ in late} == tree.of[NODE]

    trio.run(main)


def test_a_slow_pass_that_began_before_does_not_serve_who_started_after() -> None:
    """The late reader's pass overtakes the early one's, which then must not take its place."""

    async def main() -> None:
        tree = Flat(*many(64))
        gate = trio.Event()
        waiting = 0

        async def breathe() -> None:
            nonlocal waiting
            waiting += 1
            if waiting == 1:
                await gate.wait()

        kept = Listings(breathe, step=16)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kept.after, tree, NODE, 0, 5)
            await trio.testing.wait_all_tasks_blocked()
            new = {b"a-%d" % number for number in range(30)}  # where the slow pass has been already
            tree.of[NODE] |= new
            late = await kept.after(tree, NODE, 0, 5)
            gate.set()
        assert set(await rest(kept, tree, late[-1][1])) | {name for name, _ in late} == tree.of[NODE]

    trio.run(main)


def test_positions_hold_across_generations() -> None:
    async def main() -> None:
        tree = Flat(*many(20))
        kept = Listings()
        first = dict(await kept.after(tree, NODE, 0, 20))
        assert first == dict(await kept.after(tree, NODE, 0, 20)), "nothing has changed"
        tree.of[NODE] ^= {b"name-0", b"name-20"}
        kept.ended(tree, NODE, max(first.values()))
        second = dict(await kept.after(tree, NODE, 0, 20))
        both = first.keys() & second.keys()
        assert len(both) == 19
        assert all(first[name] != second[name] for name in both), "the kernel does not join them"
        for name in both:
            for limit in (1, 20):
                assert await kept.after(tree, NODE, first[name], limit) == await kept.after(
                    tree, NODE, second[name], limit
                )

    trio.run(main)


async def read(kept: Listings, tree: Tree, position: int = 0, limit: int = 10) -> int:
    """Reads on to the end; the position there."""
    while batch := await kept.after(tree, NODE, position, limit):
        position = batch[-1][1]
    return position


async def halfway(kept: Listings, tree: Tree) -> int:
    return (await kept.after(tree, NODE, 0, 25))[-1][1]


def test_who_has_read_one_listing_of_now_may_keep_it() -> None:
    async def main() -> None:
        tree, kept = Flat(*many(50)), Listings()
        for _ in range(2):
            assert kept.ended(tree, NODE, await read(kept, tree))
        # Many at once, some of whom stop halfway.
        early = await halfway(kept, tree)
        await halfway(kept, tree)
        end = await read(kept, tree)
        assert kept.ended(tree, NODE, end)
        assert await read(kept, tree, early) == end
        assert kept.ended(tree, NODE, end)
        # Then it changes.
        tree.of[NODE] ^= {b"new"}
        assert kept.ended(tree, NODE, await read(kept, tree))
        empty = Flat()
        for position in (0, 1, 2):  # behind neither, one or both of . and ..
            assert await kept.after(empty, NODE, position, 10) == []
            assert kept.ended(empty, NODE, position)

    trio.run(main)


@pytest.mark.parametrize("began", [False, True])
def test_what_changed_while_it_was_read_may_not_be_kept(began: bool) -> None:
    """Nor what was completed that somebody had begun before: but then the next listing."""

    async def main() -> None:
        tree, kept = Flat(*many(50)), Listings()
        early = await halfway(kept, tree)
        tree.of[NODE] ^= {b"new"}
        end = await read(kept, tree, early if began else 0)
        assert not kept.ended(tree, NODE, end)
        if not began:
            assert not kept.ended(tree, NODE, await read(kept, tree, early)), "with an earlier generation"
        assert kept.ended(tree, NODE, await read(kept, tree))

    trio.run(main)


def test_what_changes_before_the_end_is_told_may_not_be_kept() -> None:
    async def main() -> None:
        tree, kept = Flat(*many(50)), Listings()
        end = await read(kept, tree)
        tree.of[NODE] ^= {b"new"}
        assert not kept.ended(tree, NODE, end)

    trio.run(main)


def test_readers_of_two_generations_may_have_been_joined() -> None:
    async def main() -> None:
        tree, kept = Flat(*many(50)), Listings()
        early = await halfway(kept, tree)
        tree.of[NODE] ^= {b"new"}
        assert not kept.ended(tree, NODE, await read(kept, tree))
        late = await halfway(kept, tree)
        assert early != late
        end = await read(kept, tree, early)
        assert end == await read(kept, tree, late)
        assert not kept.ended(tree, NODE, end)

    trio.run(main)


def test_what_was_not_given_in_full_may_not_be_kept() -> None:
    async def main() -> None:
        tree, kept = Flat(*many(50)), Listings()
        end = await read(kept, tree)
        kept.passed_over(tree, NODE)
        assert not kept.ended(tree, NODE, end)
        assert not kept.ended(tree, NODE, end), "nothing was read since"
        large = Listings(stretch_max=30, step=5)
        assert not large.ended(tree, NODE, await read(large, tree)), "more than a stretch"
        only = Flat(b"only")
        position = (await kept.after(only, NODE, 0, 1))[-1][1]
        assert not kept.ended(only, NODE, 2), "whoever is behind .. has not seen it"
        only.of[NODE].clear()
        assert await kept.after(only, NODE, 0, 1) == []
        assert not kept.ended(only, NODE, position), "a name was read that is gone"

    trio.run(main)


@pytest.mark.parametrize("step", [1000, 10])
def test_what_fills_its_pages_is_never_kept(step: int) -> None:
    async def main() -> None:
        tree, kept = Flat(*(b"%03d" % number for number in range(126))), Listings(step=step)
        for _ in range(2):
            assert not kept.ended(tree, NODE, await read(kept, tree))
        tree.of[NODE].add(b"new")
        assert kept.ended(tree, NODE, await read(kept, tree))
        kept.page_bytes = 65_536
        tree.of[NODE].remove(b"new")
        assert kept.ended(tree, NODE, await read(kept, tree))

    trio.run(main)


def test_a_tree_that_can_not_tell_of_changes_has_nothing_kept() -> None:
    async def main() -> None:
        tree, kept = Flat(*many(50)), Listings()
        tree.listing_version = lambda node: None  # type: ignore[method-assign]
        assert not kept.ended(tree, NODE, await read(kept, tree))
        tree.of[NODE].add(b"new")
        assert b"new" in await rest(kept, tree)

    trio.run(main)


def test_names_of_equal_hashes_are_all_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to be had in practice: so the hash is made bad."""
    monkeypatch.setattr(listings, "place_of", lambda name: (len(name) % 7 + 1) << 20 & ~7)

    async def main() -> None:
        tree = Flat(*(b"x" * length + b"%d" % number for length in range(7) for number in range(6)))
        for limit in (1, 2, 3, 50):
            for stretch_max in (1, 5, 1000):
                kept = Listings(stretch_max=stretch_max, step=1)
                assert sorted(await rest(kept, tree, 0, limit)) == sorted(tree.of[NODE])

    trio.run(main)


def test_a_directory_larger_than_a_stretch_takes_a_few_passes() -> None:
    async def main() -> None:
        tree = Flat(*many(20_000))
        breaths = 0

        async def breathe() -> None:
            nonlocal breaths
            breaths += 1

        kept = Listings(breathe, names_max=20_000, stretch_max=5_000, step=1_000)
        assert len(set(await rest(kept, tree, 0, 100))) == 20_000
        assert 4 <= tree.passes <= 6
        assert breaths >= tree.passes * 20
        kept.ended(tree, NODE, 1 << 62)
        assert kept.names_kept < 10, "what was read to its end is not kept"

    trio.run(main)


def test_what_is_kept_is_bounded() -> None:
    async def main() -> None:
        tree = Flat(*many(100))
        tree.of |= {node: {b"%d" % node} for node in range(2, 2000)}
        kept = Listings(names_max=400, stretch_max=100, step=50)
        for node in tree.of:
            assert len(await kept.after(tree, node, 0, 1)) == 1
            assert kept.names_kept <= 400
        assert len(kept._directories) <= 400
        big = Flat(*many(1000))
        position = 0
        while batch := await kept.after(big, NODE, position, 10):
            position = batch[-1][1]
            assert kept.names_kept <= 400
        assert big.passes <= 13, "its own oldest names went first"

    trio.run(main)


def test_a_small_directory_is_read_without_waiting() -> None:
    """Like all that the daemon answers from memory: its fast path depends on that."""
    with pytest.raises(StopIteration) as result:
        Listings(trio.lowlevel.checkpoint).after(Flat(*many(1000)), NODE, 0, 10).send(None)
    assert len(result.value.value) == 10

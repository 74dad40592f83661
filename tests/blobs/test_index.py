"""The index against a dict of sets."""

import random

from aspenfs.blobs.index import PrefixIndex


def test_a_prefix_may_have_several_locations_and_counts_once() -> None:
    index = PrefixIndex()
    index.add(5, 1)
    index.add(5, 2)
    index.add(6, 1)
    assert sorted(index.find(5)) == [1, 2]
    assert len(index) == 2
    assert index.remove(5, 1)
    assert not index.remove(5, 1)
    assert list(index.find(5)) == [2]
    assert len(index) == 2
    assert index.remove(5, 2)
    assert len(index) == 1
    assert list(index.find(5)) == []
    assert not index.contains(5, 2)
    assert index.contains(6, 1)


def test_what_find_gave_does_not_change_later() -> None:
    index = PrefixIndex()
    index.add(5, 1)
    found = index.find(5)
    index.add(5, 2)
    index.remove(5, 1)
    assert list(found) == [1]


def test_the_index_agrees_with_a_dict_of_sets() -> None:
    rng = random.Random(1)
    index, model = PrefixIndex(), dict[int, set[int]]()
    prefixes = [rng.getrandbits(64) for _ in range(50)] + [0, 1, 2**64 - 1, 2**52 - 1, 2**52]
    for _ in range(5000):
        prefix, location = rng.choice(prefixes), rng.randrange(4)
        places = model.setdefault(prefix, set())
        if location in places:
            assert index.contains(prefix, location)
            assert index.remove(prefix, location)
            places.remove(location)
        else:
            assert not index.contains(prefix, location)
            assert not index.remove(prefix, location)
            index.add(prefix, location)
            places.add(location)
        assert set(index.find(prefix)) == places
        assert len(index) == sum(map(bool, model.values()))

"""Keys of any length in the state keep byte order, in both directions, against a sorted dict."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from aspenfs.kv.types import NO_ATTRIBUTES, Record
from aspenfs.limits import STORE_KEY_BYTES_MAX
from aspenfs.runtime.longkeys import CHUNK
from aspenfs.runtime.statedb import StateDb

# Few letters and lengths around the multiples of CHUNK, so that keys share chunks, end where a
# chunk ends, and are prefixes of one another.
_edges = st.sampled_from([0, 1, 2, CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK,
                          2 * CHUNK + 1, 3 * CHUNK, STORE_KEY_BYTES_MAX - 9])  # fmt: skip
_letters = st.sampled_from([b"\x00", b"a", b"\xff"])
_tails = st.lists(st.sampled_from([0, 97, 255]), max_size=3).map(bytes)
_long = st.builds(lambda letter, size, tail: letter * size + tail, _letters, _edges, _tails)
_forks = st.builds(lambda letter, size, fork, more, tail: letter * size + fork * more + tail,
                   _letters, st.sampled_from([1, CHUNK, CHUNK + 3]), _letters,
                   st.sampled_from([CHUNK - 3, CHUNK, CHUNK * 2]), _tails)  # fmt: skip
_bounds = st.one_of(_long, _forks, st.binary(max_size=4))
_keys = _bounds.filter(bool)
_batches = st.lists(st.tuples(_keys, st.one_of(st.none(), st.binary(max_size=3))), max_size=12)


@settings(max_examples=120, deadline=None)
@given(batches=st.lists(_batches, min_size=1, max_size=5),
       ranges=st.lists(st.tuples(_bounds, _bounds), min_size=1, max_size=8))  # fmt: skip
def test_state_is_a_sorted_dict(batches: list[list[tuple[bytes, bytes | None]]],
                                ranges: list[tuple[bytes, bytes]]) -> None:
    model: dict[bytes, Record] = {}
    with tempfile.TemporaryDirectory() as directory:
        db = StateDb(Path(directory) / "state")
        for index, batch in enumerate(batches, 1):
            effects: dict[bytes, Record | None] = {}
            for key, value in batch:
                effects[key] = None if value is None else Record(value, index, index, 1, 0, 0, NO_ATTRIBUTES)
            db.apply(sorted(effects.items()), index)
            for key, record in effects.items():
                if record is None:
                    model.pop(key, None)
                else:
                    model[key] = record
        db.refresh()
        ordered = sorted(model.items())
        for key, _ in [pair for batch in batches for pair in batch]:
            assert db.get(key) == model.get(key)
        keys = [key for key, _ in ordered]
        exact = [(a, b) for a in [b"", *keys[::3]] for b in [b"", *keys[1::3]]]
        for start, end in [(b"", b""), *ranges, *exact[:12]]:
            expected = [(key, record) for key, record in ordered if start <= key and (not end or key < end)]
            assert list(db.items(start, end)) == expected
            assert list(db.items(start, end, reverse=True)) == expected[::-1]
        assert db.verify().keys == len(model)
        db.close()

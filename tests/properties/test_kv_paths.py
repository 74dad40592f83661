"""Keys and paths below kv/ are a bijection, for any bytes."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from aspenfs import errors
from aspenfs.limits import KEY_BYTES_MAX, NAME_BYTES_MAX
from aspenfs.views.kv_paths import (
    VALUE_NAME,
    child,
    component_names,
    escape,
    is_continuation,
    key_of,
    levels,
    name_bytes_min,
    path_of,
    place_of,
    unescape,
)

# Runs of one byte make the long components; the alphabet is what the escapes are about.
pieces = st.one_of(
    st.sampled_from([b"/", b"//", b".", b"..", b"%", b"%%", b"%25", b"%value", b"%+", b"\0", b"\xff", b"a"]),
    st.binary(max_size=8),
    st.builds(
        lambda byte, count: byte * count, st.sampled_from([b"a", b"%", b"\0", b"."]), st.integers(240, 520)
    ),
)
keys = (
    st.lists(pieces, min_size=1, max_size=6).map(b"".join).filter(bool).map(lambda key: key[:KEY_BYTES_MAX])
)
names = st.one_of(
    st.lists(
        st.sampled_from([b"%", b"25", b"00", b"2E", b"+", b"value", b"a", b"a" * 250, b"."]),
        min_size=1,
        max_size=6,
    ).map(b"".join),
    st.binary(min_size=1, max_size=300),
).filter(lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b".."))


@given(keys)
@example(b"/")
@example(b"//")
@example(b"a/")
@example(b"/a")
@example(b"../.")
@example(b"x" * 1024)
@example(b"%" * 1024)
@example(b"x" * 251 + b"/y")
@example(b"x" * 255 + b"/" + b"y" * 256)
@example(b"x" * 256 + b"/" * 2 + b"y" * 600)
def test_path_of_a_key_leads_back_to_it_with_names_that_a_kernel_takes(key: bytes) -> None:
    for is_directory in (False, len(key) < KEY_BYTES_MAX):  # nothing fits below the longest
        path = path_of(key, is_directory=is_directory)
        assert key_of(path) == key
        for name in path:
            assert 0 < len(name) <= NAME_BYTES_MAX
            assert b"/" not in name
            assert b"\0" not in name
            assert name not in (b".", b"..")


@given(st.lists(names, min_size=1, max_size=4))
def test_a_path_that_leads_to_a_key_is_the_path_of_that_key(path: list[bytes]) -> None:
    try:
        key = key_of(path)
    except errors.NameTooLong:
        return
    if key is not None:
        assert path_of(key, is_directory=path[-1] == VALUE_NAME) == path


@given(st.lists(keys, min_size=2, max_size=8, unique=True))
def test_no_two_keys_share_a_path_whatever_is_a_directory(some: list[bytes]) -> None:
    paths = {
        tuple(path_of(key, is_directory=any(other.startswith(key + b"/") for other in some))) for key in some
    }
    assert len(paths) == len(some)


@given(st.lists(keys, min_size=2, max_size=8, unique=True))
def test_no_path_of_a_key_is_a_directory_of_another(some: list[bytes]) -> None:
    directories: set[tuple[bytes, ...]] = set()
    for key in some:
        path = path_of(key)
        directories.update(tuple(path[:depth]) for depth in range(1, len(path)))
    for key in some:
        is_directory = any(other.startswith(key + b"/") for other in some)
        assert tuple(path_of(key, is_directory=is_directory)) not in directories


@given(keys)
def test_levels_walk_down_to_the_directory_of_a_key_as_child_does(key: bytes) -> None:
    parent, name = place_of(key)
    at = b""
    for level in levels(parent):
        assert level.parent == at
        step = child(at, level.name)
        assert step is not None
        assert step.directory == level.directory
        at = level.directory
    assert at == parent
    here = child(at, name)
    assert here is not None
    assert here.key == key


@given(st.binary(max_size=1024).filter(lambda component: b"/" not in component))
def test_escape_is_undone_by_unescape(component: bytes) -> None:
    assert unescape(escape(component)) == component


@given(st.binary(max_size=300))
def test_what_unescapes_is_the_escape_of_it(name: bytes) -> None:
    component = unescape(name)
    assert component is None or escape(component) == name


@settings(max_examples=200)
@given(st.integers(252, 600), st.sampled_from([b"a", b"%", b"\0"]), st.binary(max_size=40))
def test_names_of_a_long_component_share_what_its_bytes_share(size: int, byte: bytes, tail: bytes) -> None:
    component = byte * size
    longer = component + tail.replace(b"/", b"")
    short, long_ = component_names(component), component_names(longer)
    # A directory that one of them is in is the directory of both, as far as pieces are full in both.
    assert long_[: len(short) - 1] == short[:-1]


def test_continuation_holds_only_names_that_did_not_fit_above() -> None:
    prefix = b"p/" + b"x" * 251
    assert is_continuation(prefix)
    least = name_bytes_min(prefix)
    assert least == 5
    assert child(prefix, b"abcd") is None
    assert child(b"p/", b"x" * 251 + b"abcd") == (prefix + b"abcd", prefix + b"abcd/")
    assert child(prefix, b"abcde") == (prefix + b"abcde", prefix + b"abcde/")


def test_names_that_stand_for_nothing() -> None:
    for name in (
        b"%",
        b"%2",
        b"%zz",
        b"%2e",
        b"a%2E",
        b"%2F",
        b"%41",
        b"100%",
        b"%valu",
        b"a%+",
        b"%empty%+",
    ):
        assert child(b"", name) is None, name
    assert child(b"", VALUE_NAME) is None
    assert child(b"/", VALUE_NAME) is None  # the empty key
    assert child(b"x" * 251, VALUE_NAME) is None


def test_key_of_1024_bytes_is_never_a_directory_and_one_more_byte_is_too_long() -> None:
    prefix = (b"d" * 199 + b"/") * 5
    assert child(prefix, b"f" * 24) == (prefix + b"f" * 24, None)
    try:
        child(prefix, b"f" * 25)
    except errors.NameTooLong:
        return
    raise AssertionError("a key of 1,025 bytes")

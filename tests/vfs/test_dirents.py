"""Listings in the kernel's pages. What the kernel does with them: `tests/mount/test_listings.py`."""

import pytest

from aspenfs.vfs.dirents import DOTS_BYTES, used_after

PAGE = 4096


@pytest.mark.parametrize(
    ("names", "fills"),
    [
        ([], False),
        ([b"12345678"] * 126, True),  # 32 bytes each, with the dots 128
        ([b"1"] * 126, True),
        ([b"12345678"] * 125, False),
        ([b"12345678"] * 125 + [b"123456789"], False),  # the last one is alone in the second page
        ([b"12345678"] * 125 + [b"123456789"] + [b"12345678"] * 126, False),
        ([b"12345678"] * 125 + [b"123456789"] + [b"x" * 8] * 126 + [b"x"], False),
        ([b"x" * 40] * 63, True),  # 64 bytes each
        ([b"x" * 40] * 63 + [b"x" * 40] * 64, True),
        ([b"x" * 40] * 63 + [b"x" * 40] * 63, False),
        ([b"x" * 255] * 14, False),
    ],
)
def test_a_listing_that_ends_with_its_page_is_told(names: list[bytes], fills: bool) -> None:
    assert (used_after(DOTS_BYTES, names, PAGE) == PAGE) is fills
    half = len(names) // 2
    assert (used_after(used_after(DOTS_BYTES, names[:half], PAGE), names[half:], PAGE) == PAGE) is fills

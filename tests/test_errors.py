"""The error tree: every leaf has an errno of its own choosing, and the docstring shows the tree."""

import errno
import re
from collections.abc import Iterator

from aspenfs import errors


def leaves(kind: type[errors.AspenError]) -> Iterator[type[errors.AspenError]]:
    below = kind.__subclasses__()
    if not below:
        yield kind
    for each in below:
        yield from leaves(each)


def test_every_leaf_of_the_error_tree_has_an_errno() -> None:
    found = [leaf for leaf in leaves(errors.AspenError) if leaf.__module__ == "aspenfs.errors"]
    assert len(found) > 30
    for leaf in found:
        assert leaf.errno in errno.errorcode, leaf


def test_the_docstring_draws_every_leaf_with_its_errno() -> None:
    drawn = errors.__doc__ or ""
    for leaf in leaves(errors.AspenError):
        if leaf.__module__ == "aspenfs.errors":
            word = re.search(rf"\b{leaf.__name__}\s+(E[A-Z0-9]+)", drawn)
            assert word is not None, leaf
            assert getattr(errno, word[1]) == leaf.errno, leaf

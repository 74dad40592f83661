"""Some seeds of trouble, all of it at once; `python -m tests.cluster.chaos FIRST COUNT STEPS` runs more.

What seeds have found has tests of its own, which say what it was.
"""

import pytest

from tests.cluster.chaos import Chaos


@pytest.mark.parametrize("seed", range(60))
def test_a_cluster_survives_and_gets_well(seed: int) -> None:
    Chaos(seed).run(6_000)

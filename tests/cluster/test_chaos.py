"""Some seeds of trouble, all of it at once; `python -m tests.cluster.chaos` runs more.

Seeds that once found something, with what it was:
"""

import pytest

from tests.cluster.chaos import Chaos

FOUND = {
    19: "a proposal is refused while earlier ones wait to be applied",
}


@pytest.mark.parametrize("seed", range(60))
def test_a_cluster_survives_and_gets_well(seed: int) -> None:
    Chaos(seed).run(4_000)

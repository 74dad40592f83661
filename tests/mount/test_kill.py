"""kill -9 of the daemon under load: what was acknowledged is there, and nothing is half done."""

import pytest

from tests.mount.mounting import Mount
from tests.mount.torture import Torture

pytestmark = pytest.mark.mount
ROUNDS = 5  # tools/torture does more


@pytest.mark.timeout(400)  # a quarter of a minute on an idle machine
def test_everything_acknowledged_survives_kill_9_and_nothing_is_half_done(own_mount: Mount) -> None:
    torture = Torture(own_mount, seed=1)
    rounds = [torture.round() for _ in range(ROUNDS)]
    torture.finish()
    assert sum(one.operations for one in rounds) > 500
    assert len(torture.kinds) >= 15, torture.kinds

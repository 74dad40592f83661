"""Clocks beyond what a lease supposes: they are found, leases end, reads stay linearizable."""

from collections.abc import Iterator

import pytest

from aspenfs.limits import CLOCK_CLEAN_S, CLOCK_DRIFT_PPM_MAX, CLOCK_SAMPLE_S
from aspenfs.sim.invariants import Violation
from aspenfs.sim.scheduler import MS
from tests.sim.scenario import Scenario, value

FOUND_MS = 10 * CLOCK_SAMPLE_S * 1_000
CLEAN_MS = 3 * CLOCK_CLEAN_S * 1_000
BAD_PPM = CLOCK_DRIFT_PPM_MAX


@pytest.fixture
def three() -> Iterator[Scenario]:
    """Whose clocks run as time does."""
    with Scenario(3) as scenario:
        for one in scenario.cluster.machines.values():
            one.clock.set_drift(0)
        yield scenario


def leases(scenario: Scenario, node: int) -> bool:
    return scenario[node].replica.leases_allowed()


def has_lease(scenario: Scenario, node: int) -> bool:
    """After a read, which makes one if it may."""
    scenario.get(node, b"k/a")
    return scenario[node].replica.read_now()


@pytest.mark.parametrize("ppm", [BAD_PPM, -BAD_PPM])
@pytest.mark.parametrize("of_the_leader", [True, False])
def test_a_clock_beyond_the_bound_ends_leases_until_it_runs_well(
    three: Scenario, of_the_leader: bool, ppm: int
) -> None:
    leader = three.leader()
    follower, other = three.others(leader)
    three.put(leader, b"k/a", b"1")
    assert has_lease(three, leader)
    bad = leader if of_the_leader else follower
    three.cluster.machines[bad].clock.set_drift(ppm)
    three.until(lambda: not leases(three, leader), FOUND_MS)
    assert not has_lease(three, leader)
    assert three.get(leader, b"k/a") == three.get(other, b"k/a") == b"1"
    three.cluster.machines[bad].clock.set_drift(0)
    three.until(lambda: leases(three, leader), CLEAN_MS)
    assert has_lease(three, leader)


def test_those_whose_clocks_agree_keep_their_leases(three: Scenario) -> None:
    leader = three.leader()
    three.pass_ms(2 * FOUND_MS)
    assert leases(three, leader)
    gains = three[leader].clocks.rates.rates
    assert gains.keys() == {*three.others(leader)}
    assert all(rate.low_ppm <= 0 <= rate.high_ppm for rate in gains.values())


def test_a_leap_of_its_clock_ends_a_leaders_lease_at_once(three: Scenario) -> None:
    """Shorter than the lease: by its clock it would go on."""
    leader = three.leader()
    assert has_lease(three, leader)
    three.cluster.machines[leader].clock.leap(10 * MS)
    assert not three[leader].replica.read_now()
    assert not has_lease(three, leader)
    three.until(lambda: leases(three, leader), CLEAN_MS)
    assert has_lease(three, leader)


def test_a_machine_that_was_started_again_counts_anew(three: Scenario) -> None:
    leader = three.leader()
    follower = three.others(leader)[0]
    three.pass_ms(2 * FOUND_MS)
    three.down(follower, power=True)
    three.cluster.machines[follower].clock._boot_ns = 0
    three.start(follower)
    three.pass_ms(FOUND_MS)
    assert all(leases(three, node) for node in three.nodes)


# --- clocks far beyond the bound ---


def elect_behind_a_slow_leader(scenario: Scenario) -> None:
    """The leader's second is two, the others' two thirds: their promises end long before its lease does."""
    leader = scenario.leader()
    scenario.put(leader, b"k/a", b"1")
    for node, one in scenario.cluster.machines.items():
        one.clock.set_drift(-500_000 if node == leader else 500_000)
    scenario.pass_ms(FOUND_MS)
    assert scenario.leader() == leader
    scenario.get(leader, b"k/a")
    scenario.isolate(leader)
    after = scenario.leader_among(scenario.others(leader))
    scenario.put(after, b"k/a", b"2")
    answer = scenario.ask(leader, lambda engine: value(engine, b"k/a"))
    scenario.pass_ms(100)
    assert not answer.there
    scenario.heal()
    assert answer.result() == b"2"


def test_no_lease_outlives_an_election_on_clocks_that_were_looked_at(three: Scenario) -> None:
    elect_behind_a_slow_leader(three)


def test_but_for_the_looking_one_does(three: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    for node in three.nodes:
        monkeypatch.setattr(three[node].replica, "leases_allowed", lambda: True)
    with pytest.raises(Violation, match="has a lease in term"):
        elect_behind_a_slow_leader(three)

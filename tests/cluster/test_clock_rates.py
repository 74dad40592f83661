"""Clocks of voters: what two readings prove, when leases are given up, and when they are used again."""

import itertools

import pytest

from aspenfs.cluster.clock_rates import ClockRates, Rate, Reading, rate_between
from aspenfs.limits import (
    CLOCK_CLEAN_S,
    CLOCK_DOUBT_PPM,
    CLOCK_MINUTES_MAX,
    CLOCK_SAMPLE_S,
    CLOCK_SAMPLES_MAX,
)

MS = 1_000_000
SECOND = 1_000 * MS
PEER, OTHER = 2, 3
BAD_PPM = 2 * CLOCK_DOUBT_PPM
MINUTE = CLOCK_CLEAN_S // CLOCK_SAMPLE_S  # in looks


class World:
    """This node's clock, and others that gain so and so many ppm on it."""

    def __init__(self, *voters: int) -> None:
        self.awake_ns, self.slept_ns = 7 * SECOND, 0
        self.gains_ppm = dict.fromkeys(voters, 0)
        self.shows_ns = dict.fromkeys(voters, 123 * SECOND)
        self.lives = dict.fromkeys(voters, 1)
        self.rates = ClockRates(self.boot_ns, lambda: self.awake_ns)
        self.voters = voters

    def boot_ns(self) -> int:
        return self.awake_ns + self.slept_ns

    def sleep(self, duration_ns: int) -> None:
        """The machine, not the others."""
        self.slept_ns += duration_ns
        self._others_by(duration_ns)

    def by(self, duration_ns: int) -> None:
        self.awake_ns += duration_ns
        self._others_by(duration_ns)

    def _others_by(self, duration_ns: int) -> None:
        for node, ppm in self.gains_ppm.items():
            self.shows_ns[node] += duration_ns + duration_ns * ppm // 1_000_000

    def read(self, node: int, there_ns: int, back_ns: int) -> Reading:
        sent_ns = self.boot_ns()
        self.by(there_ns)
        peer_ns = self.shows_ns[node]
        self.by(back_ns)
        return Reading(sent_ns, peer_ns, self.boot_ns())

    def look(self, node: int = PEER, *, there_ns: int = MS // 10, back_ns: int = MS // 10) -> None:
        """After the usual time."""
        self.by(CLOCK_SAMPLE_S * SECOND)
        self.rates.look()
        self.rates.keep(self.voters)
        self.rates.sampled(node, self.lives[node], [self.read(node, there_ns, back_ns)])

    def looks(self, count: int, node: int = PEER) -> None:
        for _ in range(count):
            self.look(node)

    def allowed(self) -> bool:
        return self.rates.leases_allowed()


@pytest.fixture
def world() -> World:
    return World(PEER, OTHER)


# --- what is certain ---


def test_two_readings_bound_the_rate_by_their_round_trips() -> None:
    first = Reading(0, 1_000 * SECOND, 2 * MS)
    second = Reading(10 * SECOND, 1_010 * SECOND, 10_003 * MS)
    # 10 s of the peer in 9.998 to 10.003 s here.
    assert rate_between(first, second) == Rate(-300, 201, 9_998 * MS)


def test_bounds_are_rounded_outward() -> None:
    exact = rate_between(Reading(0, 0, 0), Reading(3 * SECOND, 3 * SECOND + 1, 3 * SECOND))
    assert exact == Rate(0, 1, 3 * SECOND)


def test_readings_that_overlap_say_nothing() -> None:
    assert rate_between(Reading(0, 5, 10), Reading(10, 6, 20)) is None
    assert rate_between(Reading(0, 5, 10), Reading(9, 6, 20)) is None


def test_a_clock_that_goes_back_is_bad() -> None:
    rate = rate_between(Reading(0, 10 * SECOND, 0), Reading(SECOND, 9 * SECOND, SECOND))
    assert rate is not None
    assert rate.is_bad


# --- doubts ---


@pytest.mark.parametrize("ppm", [BAD_PPM, -BAD_PPM, 100_000, -500_000])
def test_a_clock_that_runs_otherwise_is_found_at_the_second_look(world: World, ppm: int) -> None:
    world.gains_ppm[PEER] = ppm
    world.look()
    assert world.allowed()
    world.look()
    assert not world.allowed()
    (node, rate), = world.rates.doubts.items()
    assert node == PEER
    assert rate.low_ppm <= ppm <= rate.high_ppm
    assert world.rates.rates[PEER] == rate


@pytest.mark.parametrize("ppm", [0, 400, -400])
def test_a_clock_within_the_bound_is_left_alone_and_measured(world: World, ppm: int) -> None:
    world.gains_ppm[PEER] = ppm
    world.looks(3 * MINUTE)
    assert world.allowed()
    rate = world.rates.rates[PEER]
    assert rate.low_ppm <= ppm <= rate.high_ppm
    assert rate.width_ppm < 10


def test_a_long_round_trip_proves_nothing_but_many_do(world: World) -> None:
    """100 ms each: only after minutes they weigh less than what the clock gains."""
    world.gains_ppm[PEER] = BAD_PPM
    looks = 0
    while world.allowed():
        world.look(there_ns=99 * MS, back_ns=MS)
        looks += 1
    assert 2 * MINUTE < looks < (CLOCK_MINUTES_MAX + 1) * MINUTE


def test_a_stop_in_the_middle_of_a_reading_makes_nobody_doubt(world: World) -> None:
    for there_ns, back_ns in ((20 * SECOND, 0), (0, 20 * SECOND), (3 * SECOND, 3 * SECOND)):
        world.looks(3)
        world.look(there_ns=there_ns, back_ns=back_ns)
    world.looks(3)
    assert world.allowed()


def test_of_several_readings_the_quickest_counts(world: World) -> None:
    world.gains_ppm[PEER] = BAD_PPM
    world.rates.keep(world.voters)
    for _ in range(2):
        world.by(CLOCK_SAMPLE_S * SECOND)
        readings = [world.read(PEER, SECOND, 0), world.read(PEER, 0, MS // 10), world.read(PEER, 0, SECOND)]
        world.rates.sampled(PEER, 1, readings)
    assert not world.allowed()


def test_the_best_reading_of_each_minute_is_kept(world: World) -> None:
    world.gains_ppm[PEER] = CLOCK_DOUBT_PPM + 10
    world.look()
    for _ in range(4 * CLOCK_SAMPLES_MAX):
        world.look(there_ns=200 * MS, back_ns=200 * MS)
    assert world.allowed()
    world.look()
    assert not world.allowed()  # the two that were quick are four minutes apart


def test_two_lives_of_a_peer_are_not_compared(world: World) -> None:
    """After a reboot its boot time begins anew."""
    world.looks(MINUTE)
    world.shows_ns[PEER] = 5 * SECOND
    world.lives[PEER] = 2
    world.looks(MINUTE)
    assert world.allowed()


def test_a_restart_does_not_cure_a_clock(world: World) -> None:
    world.gains_ppm[PEER] = BAD_PPM
    world.looks(2)
    world.lives[PEER] = 2
    world.look()
    assert not world.allowed()


def test_one_doubted_voter_is_enough(world: World) -> None:
    world.gains_ppm[PEER] = BAD_PPM
    for _ in range(3):
        world.look(PEER)
        world.look(OTHER)
    assert list(world.rates.doubts) == [PEER]
    assert not world.allowed()


def test_who_is_no_voter_any_more_does_not_matter(world: World) -> None:
    world.gains_ppm[PEER] = BAD_PPM
    world.looks(2)
    assert not world.allowed()
    world.voters = (OTHER,)
    world.looks(3)
    assert world.allowed()
    world.voters = (OTHER, PEER)
    world.look()
    assert world.allowed()  # nothing is remembered


# --- when leases are used again ---


def test_a_clock_that_runs_well_again_is_trusted_after_a_clean_minute(world: World) -> None:
    world.gains_ppm[PEER] = BAD_PPM
    world.looks(5)
    world.gains_ppm[PEER] = 0
    world.looks(MINUTE - 1)
    assert not world.allowed()
    world.looks(1)
    assert world.allowed()
    assert world.rates.doubts == {}


def test_a_clock_that_stays_bad_is_never_trusted_however_long_its_round_trips(world: World) -> None:
    world.gains_ppm[PEER] = BAD_PPM
    world.looks(2)
    for _ in range(20 * MINUTE):
        world.look(there_ns=10 * MS, back_ns=10 * MS)
        assert not world.allowed()


def test_a_bad_moment_begins_the_minute_anew(world: World) -> None:
    world.gains_ppm[PEER] = BAD_PPM
    world.looks(2)
    for _ in range(3):
        world.gains_ppm[PEER] = 0
        world.looks(MINUTE - 2)
        world.gains_ppm[PEER] = BAD_PPM
        world.looks(2)
        assert not world.allowed()


def test_where_nothing_can_be_proved_ten_minutes_without_a_finding_are_enough(world: World) -> None:
    world.shows_ns[PEER] += SECOND
    world.looks(1)
    world.shows_ns[PEER] += 5 * SECOND  # it leaps, once
    world.look()
    assert not world.allowed()
    looks = 0
    while not world.allowed():
        world.look(there_ns=SECOND, back_ns=SECOND)
        looks += 1
    assert looks == CLOCK_MINUTES_MAX * CLOCK_SAMPLES_MAX + 1


# --- the own clock ---


def test_after_a_sleep_of_the_machine_no_lease_is_used_from_the_first_moment(world: World) -> None:
    world.looks(3)
    world.sleep(2 * MS)
    assert not world.allowed()  # nobody has looked yet
    world.rates.look()
    assert not world.allowed()
    assert world.rates.leap_ns == 2 * MS


def test_after_a_clean_minute_leases_are_used_again(world: World) -> None:
    world.sleep(3 * SECOND)
    world.rates.look()
    world.looks(MINUTE - 1)
    assert not world.allowed()
    world.looks(2)
    assert world.allowed()
    assert world.rates.leap_ns == 0


def test_a_second_sleep_begins_the_minute_anew(world: World) -> None:
    world.sleep(3 * SECOND)
    world.looks(MINUTE - 1)
    world.sleep(3 * SECOND)
    world.looks(MINUTE - 1)
    assert not world.allowed()


def test_the_others_are_not_blamed_for_a_sleep_that_was_counted_wrongly(world: World) -> None:
    """The machine slept for 5 s, and its clock says 3."""
    world.looks(3)
    reading = world.read(PEER, 0, 0)
    world.slept_ns += 3 * SECOND
    world._others_by(5 * SECOND)
    late = Reading(reading.sent_ns, reading.peer_ns, world.boot_ns())
    world.rates.sampled(PEER, 1, [late])  # it was under way meanwhile
    world.looks(3)
    assert world.rates.doubts == {}
    assert not world.allowed()


@pytest.mark.parametrize("gaps_ms", [(40,), (40, 0), (0, 40), (40, 40, 0, 0, 0), (0, 0, 0, 40, 0)])
def test_clocks_that_are_read_one_after_the_other_are_no_sleep(gaps_ms: tuple[int, ...]) -> None:
    """The process is stopped between two readings of its own clocks, again and again."""
    now, gaps = [0], itertools.cycle(gaps_ms)

    def read() -> int:
        now[0] += next(gaps) * MS
        return now[0]

    rates = ClockRates(read, read)
    for _ in range(50):
        rates.look()
        assert rates.leases_allowed()

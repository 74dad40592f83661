"""Whatever happens on the way: a clock that keeps to the bound is never doubted, one beyond it is found."""

from hypothesis import given
from hypothesis import strategies as st

from aspenfs.cluster.clock_rates import ClockRates, Reading
from aspenfs.limits import CLOCK_DOUBT_PPM, CLOCK_DRIFT_PPM_MAX, CLOCK_READINGS, CLOCK_SAMPLE_S

MS = 1_000_000  # times are whole ms here, so that a gain in ppm is a whole number of ns
PEER = 2
FOUND_WITHIN = 10  # looks, with round trips of 10 ms at most

within = st.integers(-CLOCK_DOUBT_PPM, CLOCK_DOUBT_PPM)
durations_ms = st.one_of(st.integers(0, 20), st.integers(0, 3_000), st.integers(0, 600_000))


class World:
    """Two clocks, of which the peer's has the rate that is set."""

    def __init__(self) -> None:
        self.own_ns, self.peer_ns, self.ppm = 0, 10**15, 0
        self.rates = ClockRates(lambda: self.own_ns, lambda: self.own_ns)
        self.rates.keep([PEER])

    def by(self, duration_ms: int) -> None:
        self.own_ns += duration_ms * MS
        self.peer_ns += duration_ms * (MS + self.ppm)

    def read(self, there_ms: int, back_ms: int) -> Reading:
        sent_ns = self.own_ns
        self.by(there_ms)
        peer_ns = self.peer_ns
        self.by(back_ms)
        return Reading(sent_ns, peer_ns, self.own_ns)


Trip = tuple[int, int]  # there and back, ms
Step = tuple[int, int, list[Trip]]  # what the peer gains, ppm; so long nothing happens, ms; then readings

steps = st.tuples(
    within, durations_ms, st.lists(st.tuples(durations_ms, durations_ms), min_size=1, max_size=CLOCK_READINGS)
)
quick_trips = st.tuples(st.integers(0, 5), st.integers(0, 5))


@given(st.lists(steps, max_size=40))
def test_a_clock_that_keeps_to_the_bound_is_never_doubted(course: list[Step]) -> None:
    world = World()
    for ppm, wait_ms, trips in course:
        world.ppm = ppm
        world.by(wait_ms)
        world.rates.look()
        world.rates.sampled(PEER, 1, [world.read(there, back) for there, back in trips])
        assert world.rates.leases_allowed()
        assert not world.rates.doubts


@given(
    ppm=st.integers(CLOCK_DRIFT_PPM_MAX, 900_000),
    slow=st.booleans(),
    before=st.lists(steps, max_size=20),
    trips=st.lists(quick_trips, min_size=FOUND_WITHIN, max_size=FOUND_WITHIN),
)
def test_a_clock_beyond_twice_the_bound_is_found_soon(
    ppm: int, slow: bool, before: list[Step], trips: list[Trip]
) -> None:
    world = World()
    for gain, wait_ms, trips_before in before:
        world.ppm = gain
        world.by(wait_ms)
        world.rates.sampled(PEER, 1, [world.read(there, back) for there, back in trips_before])
    world.ppm = -ppm if slow else ppm
    for there_ms, back_ms in trips:
        world.by(CLOCK_SAMPLE_S * 1_000)
        world.rates.sampled(PEER, 1, [world.read(there_ms, back_ms)])
    assert not world.rates.leases_allowed()
    assert world.rates.doubts[PEER].is_bad

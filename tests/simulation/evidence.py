"""Runs that show whether admission keeps its promises: random adversaries, and a few aimed ones.

Each check yields the promises it found broken, one line each, beginning with the name of what broke.
"""

from collections.abc import Iterator, Sequence

from benchmarks.simulator import Client, ClosedLoop, OnOff, Scenario, SeatPlan, Shape, Simulation
from benchmarks.simulator.machines import CROWDED
from benchmarks.simulator.oracles import service
from benchmarks.simulator.soak import judged, played
from scheduler import Capacity, SeatTerms

HUGE = 1_000_000_000
LONG_S = 40.0
WARM_UP_S = 4.0


def seat(name: str, quantity: int = 1, guarantee: float = 0.0) -> SeatPlan:
    return SeatPlan(SeatTerms(name, quantity, guarantee, 2_000.0, HUGE, HUGE))


def loop(name: str, connections: int, shape: Shape | None = None) -> Client:
    return Client(name, ClosedLoop(connections), shape or Shape(), end_s=LONG_S)


def broken_in(scenario: Scenario, seed: int) -> list[str]:
    return judged(scenario, Simulation(scenario, seed).run()).broken


def broken_by_random_adversary(seed: int) -> list[str]:
    return played(seed)[0].broken


def share_ratio(seats: tuple[SeatPlan, SeatPlan], clients: tuple[Client, Client], slots: int) -> float:
    """Service of the first seat over that of the second, by weight, while both are backlogged."""
    scenario = Scenario(seats, clients, Capacity(slots, 1_000_000))
    got = service(Simulation(scenario, seed=1).run(), WARM_UP_S, LONG_S)
    first, second = (plan.terms for plan in seats)
    return (got[first.seat_id] / first.quantity) / (got[second.seat_id] / second.quantity)


STEADY = Shape(output_tokens=(50, 50), max_tokens=100)
PAIRS: dict[str, tuple[tuple[SeatPlan, SeatPlan], tuple[Client, Client], int]] = {
    "equal seats": ((seat("a"), seat("b")), (loop("a", 8), loop("b", 8)), 4),
    "4 and 40 connections": ((seat("a"), seat("b")), (loop("a", 4), loop("b", 40)), 4),
    "weights 1:3": ((seat("a"), seat("b", 3)), (loop("a", 8), loop("b", 24)), 8),
    "weights 1:3, 80 and 12 connections": ((seat("a"), seat("b", 3)), (loop("a", 80), loop("b", 12)), 8),
    "weights 1:3 with guarantees": (
        (seat("a", 1, 20.0), seat("b", 3, 20.0)),
        (loop("a", 24), loop("b", 24)),
        12,
    ),
    "weights 1:3 with guarantees, few slots": (
        (seat("a", 1, 20.0), seat("b", 3, 20.0)),
        (loop("a", 24), loop("b", 24)),
        6,
    ),
    "several answers to each prompt, with guarantees": (
        (seat("a", 1, 20.0), seat("b", 1, 20.0)),
        (loop("a", 16), loop("b", 8, Shape(count=2))),
        5,
    ),
    "long prompts": (
        (seat("a"), seat("b")),
        (loop("a", 8), loop("b", 8, Shape(input_tokens=(400, 500)))),
        4,
    ),
    "long outputs": (
        (seat("a"), seat("b")),
        (loop("a", 8), loop("b", 8, Shape(output_tokens=(80, 120), max_tokens=200))),
        4,
    ),
    "several answers to each prompt": (
        (seat("a"), seat("b")),
        (loop("a", 16), loop("b", 8, Shape(count=3))),
        8,
    ),
    "outputs that vary": (
        (seat("a"), seat("b")),
        (loop("a", 8, STEADY), loop("b", 8, Shape(output_tokens=(1, 100), max_tokens=100))),
        4,
    ),
    "cached prompts": (
        (seat("a"), seat("b")),
        (loop("a", 8, STEADY), loop("b", 8, Shape(input_tokens=(400, 500), cached_share=0.9))),
        4,
    ),
}
"""Two seats that stay backlogged, and the slots they share."""


def broken_by_pairs() -> Iterator[str]:
    """Seats that stay backlogged share by weight within 5 %, whatever else they do."""
    for name, (seats, clients, slots) in PAIRS.items():
        ratio = share_ratio(seats, clients, slots)
        if not 0.95 <= ratio <= 1.05:
            yield f"flood proof: {name}: by weight the first got {ratio:.2f} times what the second got"


def returning_seat() -> Scenario:
    """One seat is always there, the other comes and goes with a crowd."""
    crowd = Client("b", OnOff(40.0, on_s=5.0, off_s=10.0), end_s=LONG_S)
    return Scenario((seat("a"), seat("b")), (loop("a", 16), crowd), Capacity(4, 1_000_000))


def full_of_borrowed_work() -> Scenario:
    """Two seats use the whole node, in wide and narrow requests; two others call now and then."""
    wide = Shape(count=4, output_tokens=(50, 100), max_tokens=128)
    quiet = [Client(name, OnOff(2.0, on_s=1.0, off_s=1.0), end_s=10.0) for name in "cd"]
    clients = (Client("a", ClosedLoop(32), wide, end_s=10.0), Client("b", ClosedLoop(32), end_s=10.0), *quiet)
    return Scenario(tuple(seat(name, guarantee=50.0) for name in "abcd"), clients, Capacity(16, 1_000_000))


def late_guests(flood: Shape) -> Scenario:
    """Two seats that are owed a pace come when two floods already fill a machine that is too slow for all."""
    steady = Shape(output_tokens=(500, 600), max_tokens=600)
    clients = (
        *(Client(name, ClosedLoop(1, think_s=0.3), steady, start_s=2.0, end_s=4.0) for name in "ab"),
        *(Client(name, ClosedLoop(24), flood, end_s=12.0) for name in "cd"),
    )
    seats = (seat("a", guarantee=50.0), seat("b", guarantee=50.0), seat("c"), seat("d", 2))
    return Scenario(seats, clients, Capacity(32, 20_000), step_time=CROWDED)


def busy_reader() -> Scenario:
    """A seat that always asks for more than it has seats, long prompts and short answers, so that most of
    what it is owed is reading, in steps of few tokens; and a flood that would take them all."""
    shape = Shape(input_tokens=(200, 500), output_tokens=(2, 8), max_tokens=8)
    flood = Shape(output_tokens=(100, 300), max_tokens=300)
    terms = SeatTerms("a", 1, 23.0, 5_400.0, HUGE, HUGE)
    clients = (
        Client("a", ClosedLoop(20), shape, end_s=10.0),
        Client("b", ClosedLoop(80), flood, end_s=20.0),
    )
    seats = (SeatPlan(terms), seat("b", 20))
    return Scenario(seats, clients, Capacity(40, 100_000), step_time=CROWDED, step_tokens=64)


LONG_ANSWERS = Shape(input_tokens=(20, 60), output_tokens=(300, 400), max_tokens=400)
LONG_PROMPTS = Shape(input_tokens=(1_500, 2_000), output_tokens=(1, 4), max_tokens=8)


def tight_limits() -> Scenario:
    """Two seats press against both of their limits at once, one of them with groups of prompts."""
    seats = tuple(
        SeatPlan(SeatTerms(name, 1, 0.0, 2_000.0, rpm_limit=rpm, tpm_limit=tpm))
        for name, rpm, tpm in (("a", 3, 900), ("b", 60, 300))
    )
    shapes = (
        Shape(input_tokens=(10, 500), max_tokens=100),
        Shape(input_tokens=(20, 40), max_tokens=100, prompts=3),
    )
    clients = tuple(
        Client(plan.terms.seat_id, ClosedLoop(2), shape, end_s=200.0, retries=True)
        for plan, shape in zip(seats, shapes, strict=True)
    )
    return Scenario(seats, clients, Capacity(4, 1_000_000))


def block_border() -> Scenario:
    """One seat's block ends while its long answers fill the KV cache, and another's begins."""
    terms = [SeatTerms(name, 3, 50.0, 2_000.0, HUGE, HUGE) for name in "ab"]
    seats = (SeatPlan(terms[0], ((0.0, 2.0),)), SeatPlan(terms[1], ((2.0, None),)))
    clients = (
        Client("a", ClosedLoop(3), LONG_ANSWERS, end_s=2.0),
        Client("b", ClosedLoop(3), LONG_ANSWERS, start_s=2.1, end_s=4.0),
    )
    return Scenario(seats, clients, Capacity(8, 1_500))


def broken_by_aimed_runs() -> Iterator[str]:
    yield from broken_in(block_border(), seed=1)
    for flood in (LONG_ANSWERS, LONG_PROMPTS):
        yield from broken_in(late_guests(flood), seed=1)
    yield from broken_in(busy_reader(), seed=1)
    yield from broken_in(tight_limits(), seed=1)
    yield from broken_in(returning_seat(), seed=1)
    yield from broken_in(full_of_borrowed_work(), seed=1)
    yield from broken_by_pairs()


def broken_by_random_adversaries(seeds: Sequence[int]) -> Iterator[str]:
    for seed in seeds:
        yield from broken_by_random_adversary(seed)

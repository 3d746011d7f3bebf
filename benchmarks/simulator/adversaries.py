"""Random scenarios that try to make the scheduler break a promise; a seed gives always the same one."""

from __future__ import annotations

import math
import random
from dataclasses import astuple, replace

from benchmarks.simulator.clients import Client, ClosedLoop, OnOff, OpenLoop, Shape
from benchmarks.simulator.machines import (
    CROWDED,
    LLAMA_70B_8_H100,
    QWEN3_8B_H100,
    QWEN35_397B_8_H200,
)
from benchmarks.simulator.simulation import Change, Scenario, SeatPlan
from contract.step_time import StepTime
from scheduler import Capacity, Policy, SeatTerms

SPAN_S = 3.0
"""How long the clients stay."""
UNLIMITED = 10**9
TIGHT_EVERY, TIGHT_SPAN_S, READING_SPAN_S = 20, 4.0, 8.0
"""One seed in so many draws a node whose guarantees can just be kept, if borrowed work gives way; one more,
seats that are busy with reading, for so long."""
HUGE_SHARE, HUGE_OUTPUT = 0.02, (1_000, 3_000)
"""So many of the other nodes have a client with answers of so many tokens."""
AMPLE_KV = 100_000
"""KV tokens, where time shall be what is short."""
FREE_SHARE = 0.1
"""Of the machine, which a set of guarantees has to leave free."""
MACHINES = (QWEN3_8B_H100, LLAMA_70B_8_H100, QWEN35_397B_8_H200, CROWDED, CROWDED)


def random_scenario(seed: int) -> Scenario:
    """Two to five seats, each with one or two clients of random habits, on a small node."""
    rng = random.Random(f"scenario/{seed}")
    # Draws of their own: the seeds that they leave alone replay what they did before there were any.
    drop, huge = random.Random(f"drop/{seed}"), random.Random(f"huge/{seed}")
    if seed % TIGHT_EVERY == TIGHT_EVERY - 1:
        return _tight_scenario(rng, drop)
    if seed % TIGHT_EVERY == TIGHT_EVERY // 2 - 1:
        return _reading_scenario(rng, drop)
    slots = rng.choice((2, 4, 8, 12, 20, 40))
    kv_tokens = rng.choice((700, 2_000, 100_000))
    guarantee = rng.choice((0.0, 20.0, 50.0, 100.0))
    machine = rng.choice(MACHINES)
    names = [f"seat{i}" for i in range(rng.randint(2, 5))]
    return Scenario(
        seats=tuple(_seat(name, guarantee, rng) for name in names),
        clients=_with_huge_outputs(
            [_client(name, slots, rng) for name in names for _ in range(rng.randint(1, 2))], huge
        ),
        capacity=Capacity(slots, kv_tokens),
        # Small first guesses, bounds and timeouts, so that short runs reach them.
        policy=Policy(
            initial_output_tokens=rng.choice((8.0, 32.0, 256.0)),
            max_queued_per_seat=rng.choice((4, 16, 256)),
            queue_timeout_s=rng.choice((1.0, 60.0)),
        ),
        step_time=machine,
        seed_step_time=_guess(machine, rng),
        step_tokens=rng.choice((64, 512, 2_048)),
        changes=_changes(slots, kv_tokens, rng),
    )


def _tight_scenario(rng: random.Random, drop: random.Random) -> Scenario:
    """Seats that are sold nearly all that the machine can do when it is slowest, and floods that take the
    rest and more."""
    machine = rng.choice((CROWDED, CROWDED, LLAMA_70B_8_H100))
    slots = rng.choice((20, 40))
    changes = _drop(Capacity(slots, AMPLE_KV), drop)
    slowest = _slowest(machine, changes)
    quantities = [rng.choice((1, 1, 2)) for _ in range(rng.randint(2, 4))]
    sold, prefill_tok_s = sum(quantities), 200.0
    # Long, or a lag would end with the request before it is as long as the promise allows.
    long = Shape(input_tokens=(16, 64), output_tokens=(400, 600), max_tokens=600)
    # As many tokens a second as the machine can give each of them, prompts included.
    step_s = slowest.seconds(0, sold, sold * (long.input_tokens[1] + long.max_tokens))
    left = 1 - FREE_SHARE - slowest.prefill_token_s * sold * prefill_tok_s
    guarantee = rng.uniform(0.8, 0.99) * left / step_s
    seats, clients = [], []
    for number, quantity in enumerate(quantities):
        name = f"seat{number}"
        seats.append(SeatPlan(SeatTerms(name, quantity, guarantee, prefill_tok_s, UNLIMITED, UNLIMITED)))
        arrivals = rng.choice((ClosedLoop(quantity), ClosedLoop(quantity), OnOff(2.0, on_s=1.0, off_s=0.5)))
        clients.append(Client(name, arrivals, long, rng.choice((0.0, 0.5)), TIGHT_SPAN_S))
    seats.append(SeatPlan(SeatTerms("flooder", 1, 0.0, 5_000.0, UNLIMITED, UNLIMITED)))
    clients += [_flood(slots, rng) for _ in range(rng.randint(1, 2))]
    return Scenario(
        seats=tuple(seats),
        clients=tuple(clients),
        capacity=Capacity(slots, AMPLE_KV),
        step_time=machine,
        seed_step_time=_guess(machine, rng),
        step_tokens=rng.choice((64, 512, 2_048)),
        changes=changes,
    )


def _reading_scenario(rng: random.Random, drop: random.Random) -> Scenario:
    """Seats that ask for more at once than they have seats, long prompts and answers so short that what a
    seat misses while it reads can just be made up for (docs/scheduling.md, "What is not kept")."""
    machine = rng.choice((CROWDED, CROWDED, LLAMA_70B_8_H100))
    slots, step_tokens = rng.choice((20, 40)), rng.choice((64, 512, 2_048))
    changes = _drop(Capacity(slots, AMPLE_KV), drop)
    slowest = _slowest(machine, changes)
    quantities = [rng.choice((1, 1, 2)) for _ in range(rng.randint(1, 3))]
    sold = sum(quantities)
    longest_prompt, longest_answer = 500, 150
    step_s = slowest.seconds(0, sold, sold * (longest_prompt + longest_answer))
    guarantee = rng.uniform(0.1, 0.7) * (1 - FREE_SHARE) / step_s
    # As many prompt tokens a second as a step's time leaves at that pace, and as its tokens do.
    by_time = ((1 - FREE_SHARE) - guarantee * step_s) / slowest.prefill_token_s
    longest = step_tokens - sold
    by_tokens = (1 - FREE_SHARE) * longest / (step_s + slowest.prefill_token_s * longest)
    prefill_tok_s = rng.uniform(0.5, 0.95) * min(by_time, by_tokens) / sold
    # At twice the pace an answer has to take longer than its prompt.
    shortest = max(8, min(longest_answer, math.ceil(2 * guarantee * longest_prompt / prefill_tok_s)))
    most = min(longest_answer, shortest + rng.choice((4, 32)))
    shape = Shape(input_tokens=(200, longest_prompt), output_tokens=(shortest, most), max_tokens=most)
    seats, clients = [], []
    for number, quantity in enumerate(quantities):
        name = f"seat{number}"
        seats.append(SeatPlan(SeatTerms(name, quantity, guarantee, prefill_tok_s, UNLIMITED, UNLIMITED)))
        connections = quantity * rng.choice((2, 6, 20))
        clients.append(Client(name, ClosedLoop(connections), shape, rng.choice((0.0, 0.5)), READING_SPAN_S))
    # Of so much weight that others get little beyond what they are owed.
    seats.append(SeatPlan(SeatTerms("flooder", rng.choice((1, 20)), 0.0, 5_000.0, UNLIMITED, UNLIMITED)))
    clients.append(_flood(slots, rng))
    return Scenario(
        seats=tuple(seats),
        clients=tuple(clients),
        capacity=Capacity(slots, AMPLE_KV),
        step_time=machine,
        seed_step_time=_guess(machine, rng),
        step_tokens=step_tokens,
        changes=changes,
    )


def _flood(slots: int, rng: random.Random) -> Client:
    """Borrowed work that fills the engine until the last owed request has ended, or comes in bursts."""
    shape = Shape(
        input_tokens=rng.choice(((16, 64), (200, 500))),
        output_tokens=rng.choice(((4, 24), (100, 300))),
        max_tokens=300,
        cancel_share=rng.choice((0.0, 0.3)),
    )
    arrivals = rng.choice((ClosedLoop(2 * slots), ClosedLoop(2 * slots), OnOff(60.0, on_s=0.5, off_s=0.5)))
    return Client("flooder", arrivals, shape, rng.choice((0.0, 0.5)), 2 * TIGHT_SPAN_S)


def _seat(name: str, guarantee: float, rng: random.Random) -> SeatPlan:
    terms = SeatTerms(
        seat_id=name,
        quantity=rng.choice((1, 1, 2, 3)),
        guarantee_tok_s=guarantee,
        prefill_tok_s=rng.choice((500.0, 5_000.0)),
        rpm_limit=rng.choice((20, 100_000, 100_000)),
        tpm_limit=rng.choice((400, 2_000, 10_000_000, 10_000_000)),
    )
    border = rng.uniform(0.5, SPAN_S)
    blocks: tuple[tuple[float, float | None], ...] = ((0.0, None),)
    if rng.random() < 0.25:
        blocks = ((0.0, border), (border + 0.3, None))
    return SeatPlan(terms, blocks)


def _guess(machine: StepTime, rng: random.Random) -> StepTime:
    """What the step policy believes at first: right, or wrong in one of its terms and as a whole."""
    factor = rng.choice((1.0, 1.0, 0.7, 1.5))
    return replace(
        machine,
        base_s=machine.base_s * factor,
        prefill_token_s=machine.prefill_token_s * factor * rng.choice((1.0, 2.0)),
        decode_s=machine.decode_s * factor,
        kv_token_s=machine.kv_token_s * factor,
    )


def _client(name: str, slots: int, rng: random.Random) -> Client:
    shape = Shape(
        input_tokens=rng.choice(((1, 16), (16, 64), (200, 500))),
        output_tokens=rng.choice(((1, 4), (4, 24), (4, 24), (100, 200))),
        max_tokens=rng.choice((8, 64, 256)),
        count=rng.choice((1, 1, 1, 2, max(1, slots // 2))),
        prompts=rng.choice((1, 1, 1, 3)),
        cached_share=rng.choice((0.0, 0.0, 0.9)),
        cancel_share=rng.choice((0.0, 0.0, 0.5)),
    )
    arrivals = rng.choice(
        (
            OpenLoop(rng.choice((3.0, 15.0))),
            OnOff(rng.choice((15.0, 30.0)), on_s=0.5, off_s=0.5),
            ClosedLoop(rng.choice((1, 3, 2 * slots))),
            ClosedLoop(1, think_s=0.2),
        )
    )
    start_s = rng.choice((0.0, 0.0, 1.0))
    return Client(name, arrivals, shape, start_s, SPAN_S, retries=rng.random() < 0.5)


def _changes(slots: int, kv_tokens: int, rng: random.Random) -> tuple[Change, ...]:
    """Now and then the node slows down, or grows; it never shrinks below what it has promised to fit."""
    if rng.random() < 0.8:
        return ()
    return (Change(1.0, Capacity(slots + rng.choice((0, 4)), kv_tokens), slowdown=rng.choice((1.0, 3.0))),)


def _drop(capacity: Capacity, rng: random.Random) -> tuple[Change, ...]:
    """In every second run the machine slows down somewhat while the seats are busy, and perhaps recovers."""
    if rng.random() < 0.5:
        return ()
    at_s = rng.uniform(0.5, TIGHT_SPAN_S)
    slower = Change(at_s, capacity, slowdown=rng.uniform(1.1, 1.3))
    if rng.random() < 0.5:
        return (slower,)
    return (slower, Change(at_s + rng.uniform(0.2, TIGHT_SPAN_S), capacity))


def _slowest(machine: StepTime, changes: tuple[Change, ...]) -> StepTime:
    """The machine while it is slowest: what can be kept then can be kept throughout."""
    slowdown = max((change.slowdown for change in changes), default=1.0)
    *terms, active_share = astuple(machine)
    return replace(StepTime(*(slowdown * term for term in terms)), active_share=active_share)


def _with_huge_outputs(clients: list[Client], rng: random.Random) -> tuple[Client, ...]:
    """Now and then one of them asks for answers so long that a few of them fill the KV cache."""
    if rng.random() < HUGE_SHARE:
        place = rng.randrange(len(clients))
        shape = replace(clients[place].shape, output_tokens=HUGE_OUTPUT, max_tokens=HUGE_OUTPUT[1], count=1)
        clients[place] = replace(clients[place], shape=shape)
    return tuple(clients)

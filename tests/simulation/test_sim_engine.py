"""The simulated engine keeps vLLM's batching rules, and the artifact's engine its own."""

import random
from collections import deque

import pytest

from benchmarks.simulator.engine import KV_BLOCK, Batch, Engine, PlainVllm, Rules, Stream
from benchmarks.simulator.entry import Fits, Take
from benchmarks.simulator.machines import CROWDED, QWEN3_8B_H100, QWEN35_397B_8_H200
from benchmarks.simulator.reservation import DECODES_BETWEEN_ENTRIES, MOST_PREFILL_TOKENS, ReservationEngine
from benchmarks.simulator.workloads import Request


def engine(slots: int = 8, kv_tokens: int = 16_000, step_tokens: int = 2_048) -> Engine:
    return Engine(Rules(slots, kv_tokens, step_tokens), QWEN3_8B_H100)


def tokens(batch: Batch | None) -> dict[int, int]:
    assert batch is not None
    return {piece.stream.key: piece.tokens for piece in batch.pieces}


def step(node: Engine) -> dict[int, int]:
    batch = node.compose(0.0)
    assert batch is not None
    node.complete(batch, 0.0)
    return tokens(batch)


def test_step_time_follows_the_model() -> None:
    assert QWEN3_8B_H100.seconds(100, 10, 1_000) == pytest.approx(7.2e-3 + 2.15e-3 + 0.12e-3 + 0.046e-3)
    one, all_experts = (QWEN35_397B_8_H200.seconds(0, count, 0) for count in (1, 10_000))
    assert one == pytest.approx(7.9e-3 + 20.5e-3 * 10 / 512)
    assert all_experts == pytest.approx(7.9e-3 + 20.5e-3)


def test_prefill_is_chunked_by_the_budget_and_the_first_token_comes_with_its_last_chunk() -> None:
    node = engine()
    node.add(Stream(1, 3_000, 2), 0.0)
    node.add(Stream(2, 10, 1), 0.0)
    assert step(node) == {1: 2_048}
    assert step(node) == {1: 952, 2: 10}
    assert step(node) == {1: 1}
    assert node.compose(0.0) is None
    assert node.blocks_in_use == 0


def test_running_come_before_waiting_and_slots_bound_them() -> None:
    node = engine(slots=2)
    for key in (1, 2, 3):
        node.add(Stream(key, 10, 3), 0.0)
    assert step(node) == {1: 10, 2: 10}
    assert step(node) == {1: 1, 2: 1}
    assert step(node) == {1: 1, 2: 1}
    assert step(node) == {3: 10}


def test_two_steps_are_under_way_so_an_arrival_takes_part_in_the_one_after_next() -> None:
    node = engine()
    node.add(Stream(1, 10, 5), 0.0)
    first, second = node.compose(0.0), node.compose(0.0)
    node.add(Stream(2, 10, 5), 0.0)
    assert first is not None
    node.complete(first, 0.0)
    assert tokens(second) == {1: 1}
    assert tokens(node.compose(0.0)) == {1: 1, 2: 10}


def test_a_sequence_that_ends_by_itself_is_computed_once_more_in_vain_but_not_at_its_max_tokens() -> None:
    for max_tokens, once_more in ((2, False), (5, True)):
        node = engine()
        node.add(Stream(1, 10, 2, max_tokens=max_tokens), 0.0)
        batches = [node.compose(0.0), node.compose(0.0)]
        assert batches[0] is not None
        node.complete(batches[0], 0.0)
        batches.append(node.compose(0.0))
        assert (batches[2] is not None) is once_more
        made = sum(done.made for batch in batches[1:] if batch for done in node.complete(batch, 0.0))
        assert made == 1, "what is computed in vain is nobody's token"
        assert not node.running


def test_last_of_the_running_loses_its_kv_cache_and_begins_again() -> None:
    node = engine(kv_tokens=4 * KV_BLOCK)
    node.add(Stream(1, 30, 30), 0.0)
    node.add(Stream(2, 30, 30), 0.0)
    assert step(node) == {1: 30, 2: 30}
    step(node), step(node)
    batch = node.compose(0.0)
    assert batch is not None
    assert batch.preempted == (2,)
    assert tokens(batch) == {1: 1}
    assert [stream.key for stream in node.waiting] == [2]
    done = []
    while True:
        done += node.complete(batch, 0.0)
        following = node.compose(0.0)
        if following is None:
            break
        batch = following
    assert sum(part.made for part in done if part.key == 2) == 30 - 3
    assert sum(part.prefilled for part in done) == 0, "computing again is no service"


def test_nobody_enters_in_a_step_that_preempts() -> None:
    node = engine(kv_tokens=4 * KV_BLOCK)
    for key in (1, 2):
        node.add(Stream(key, 30, 40), 0.0)
    step(node), step(node), step(node)
    node.add(Stream(3, 5, 1), 0.0)
    assert step(node) == {1: 1}


def test_held_stream_takes_no_part_and_keeps_its_kv_cache() -> None:
    node = engine()
    node.add(Stream(1, 40, 9), 0.0)
    node.add(Stream(2, 40, 9), 0.0)
    step(node)
    held = node.running[0]
    held.held = True
    before = held.blocks
    assert step(node) == {2: 1}
    held.held = False
    assert held.blocks == before
    assert step(node) == {1: 1, 2: 1}


def test_further_sequences_of_a_prompt_find_it_in_the_cache() -> None:
    node = engine()
    leader = Stream(1, 100, 2)
    node.add(leader, 0.0)
    node.add(Stream(2, 100, 2, leader=leader), 0.0)
    assert step(node) == {1: 100, 2: 100 - 6 * KV_BLOCK}


def test_who_is_not_ready_lets_the_others_pass() -> None:
    node = engine()
    leader = Stream(1, 100, 2)
    node.add(Stream(2, 100, 2, leader=leader), 0.0)
    node.add(leader, 0.0)
    assert step(node) == {1: 100}
    assert step(node) == {1: 1, 2: 100 - 6 * KV_BLOCK}


def test_work_of_a_removed_stream_is_lost() -> None:
    node = engine()
    node.add(Stream(1, 10, 5), 0.0)
    batch = node.compose(0.0)
    assert batch is not None
    node.remove(1, 0.0)
    assert node.complete(batch, 0.0) == []
    assert node.blocks_in_use == 0


@pytest.mark.parametrize("seed", range(20))
def test_slots_and_kv_cache_are_never_exceeded_and_all_is_served(seed: int) -> None:
    rng = random.Random(seed)
    rules = Rules(
        slots=rng.randint(1, 6), kv_tokens=rng.choice((200, 1_000)), step_tokens=rng.choice((16, 256))
    )
    node = Engine(rules, CROWDED, PlainVllm())
    wanted = {key: rng.randint(1, 60) for key in range(30)}
    for key, output in wanted.items():
        node.add(Stream(key, rng.randint(1, 100), output, max_tokens=output + rng.choice((0, 9))), 0.0)
    made = dict.fromkeys(wanted, 0)
    under_way: list[Batch] = []
    while True:
        batch = node.compose(0.0)
        if batch is not None:
            under_way.append(batch)
            assert sum(piece.tokens for piece in batch.pieces) <= rules.step_tokens
        assert len(node.running) <= rules.slots
        assert node.blocks_in_use == sum(stream.blocks for stream in node.running) <= rules.kv_blocks
        if not under_way:
            break
        if len(under_way) == 2 or batch is None:
            for part in node.complete(under_way.pop(0), 0.0):
                made[part.key] += part.made
    assert made == wanted


# --- the artifact's engine -----------------------------------------------------------------------------


def requests(*sizes: tuple[int, int]) -> deque[Request]:
    return deque(Request(number, "a", 0.0, *size) for number, size in enumerate(sizes))


def from_queue(queue: deque[Request]) -> Take:
    def take(fits: Fits) -> list[Request]:
        entering = []
        while queue and fits(queue[0]):
            entering.append(queue.popleft())
        return entering

    return take


def running_after_entry(pool: int, queue: deque[Request]) -> int:
    batch = ReservationEngine(QWEN3_8B_H100, pool).compose(from_queue(queue), 0.0)
    assert batch is not None
    return len(batch.running)


def test_artifact_prefills_apart_and_looks_for_new_requests_after_ten_decodes() -> None:
    node = ReservationEngine(QWEN3_8B_H100, 10_000)
    queue = requests((100, 30))
    sizes = []
    for _ in range(14):
        batch = node.compose(from_queue(queue), 0.0)
        assert batch is not None
        sizes.append(len(batch.running))
        node.complete(batch, 0.0)
        if len(sizes) == 1:
            queue.append(Request(1, "b", 0.0, 50, 30))
    prefill, decodes = 1, DECODES_BETWEEN_ENTRIES
    assert sizes == [1] * (prefill + decodes) + [1] + [2] * 2


def test_artifact_lets_in_only_what_the_pool_holds_to_the_end() -> None:
    # At the end each of two holds 100 + 50 tokens, 300 in all, and of three 450.
    assert running_after_entry(301, requests(*[(100, 50)] * 3)) == 2
    assert running_after_entry(451, requests(*[(100, 50)] * 3)) == 3
    # A short one has left when a long one is at its end.
    assert running_after_entry(700, requests((100, 500), (100, 5))) == 2


def test_artifact_prefills_a_bounded_number_of_tokens_in_a_step() -> None:
    assert running_after_entry(10**6, requests((MOST_PREFILL_TOKENS, 5), (1, 5))) == 1

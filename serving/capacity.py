"""What the running node knows of its own capacity, measured once and then learned from every step.

The fit is kept beside the entitlements, so that the next start begins with it.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from contract.capacity import NodeCapacity, parse_capacity
from contract.step_time import StepTime
from scheduler import Capacity
from serving.step_table import TRUSTED_SAMPLES, StepTable

log = logging.getLogger("boosts.serving")

GUESS_SAMPLES = 5.0
ENOUGH_SAMPLES = 100
"""Steps without which a fit says nothing of the machine."""
SAVE_S = 60.0
IDLE_S = 600.0
"""A node that has made no step for so long is measured again: often enough for a pool that waits for it, and
a few seconds of work in ten minutes that nobody else wanted."""
LOOK_S = 0.05
"""How long somebody may have been there before measuring is called off."""

_GUESS = StepTime(base_s=5e-3, prefill_token_s=50e-6, decode_s=50e-6, kv_token_s=10e-9)
"""The order of magnitude on any machine, for the first steps."""
_GUESSED_EXPERTS_S = 5e-3


class Measurable(Protocol):
    """The engine, as far as it matters here."""

    async def measure(self) -> bool:
        """Run batches of all sizes; False when it could not run them all."""


class CapacityFile:
    """The last run's fit of this engine, on disk. `setup` stands for all that the fit depends on: another
    device, model or engine flag makes it another."""

    def __init__(self, path: Path, setup: str) -> None:
        self._path = path
        self._setup = setup

    def read(self) -> NodeCapacity | None:
        """None if there is none, or if it is another set-up's or says that steps take no time; a broken one
        is told of and passed over."""
        try:
            kept = json.loads(self._path.read_bytes())
            setup = kept.pop("setup", "") if isinstance(kept, dict) else ""
            capacity = parse_capacity(json.dumps(kept))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError, OSError) as error:
            log.warning("%s is of no use and will be written anew: %s", self._path, error)
            return None
        if setup != self._setup:
            log.info("%s was measured with another device, model or engine flags", self._path)
            return None
        return capacity if capacity.step_time.seconds(1, 1, 1) > 0 else None

    def write(self, capacity: NodeCapacity) -> None:
        """Replace it whole. Raises OSError."""
        beside = self._path.with_name(f".{self._path.name}.new")
        with beside.open("w") as file:
            json.dump({**capacity.model_dump(mode="json"), "setup": self._setup}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)


def first_guess(active_share: float) -> StepTime:
    """Where the fit begins on a machine that was never measured; `active_share` is 0 for a dense model."""
    if not active_share:
        return _GUESS
    return StepTime(
        _GUESS.base_s,
        _GUESS.prefill_token_s,
        _GUESS.decode_s,
        _GUESS.kv_token_s,
        _GUESSED_EXPERTS_S,
        active_share,
    )


def measured(table: StepTable, model_id: str, capacity: Capacity) -> NodeCapacity | None:
    """What the step scheduler has found out by now; None while that is too little."""
    readings = table.read()
    if readings.model_samples < ENOUGH_SAMPLES:
        return None
    step_time = readings.step_time
    return NodeCapacity(
        model_id=model_id,
        base_s=step_time.base_s,
        prefill_token_s=step_time.prefill_token_s,
        decode_s=step_time.decode_s,
        kv_token_s=step_time.kv_token_s,
        experts_s=step_time.experts_s,
        active_share=step_time.active_share,
        slots=capacity.slots,
        kv_tokens=capacity.kv_tokens,
        step_tokens=capacity.step_tokens,
        error=readings.model_error,
        measured_at=datetime.datetime.now(datetime.UTC),
    )


def told(
    table: StepTable, model_id: str, capacity: Capacity, known: NodeCapacity | None
) -> NodeCapacity | None:
    """What the node says of itself: what it has measured, and until that is enough what it knew when it
    started. Without that a node that has no customers yet would never get any: it is sold by this."""
    found = measured(table, model_id, capacity)
    if found is None and known is not None:
        return known.model_copy(
            update={
                "slots": capacity.slots,
                "kv_tokens": capacity.kv_tokens,
                "step_tokens": capacity.step_tokens,
            }
        )
    return found


async def measure(engine: Measurable, table: StepTable) -> None:
    """Let the fit learn from batches of all sizes."""
    log.info("measuring how fast this machine is")
    if await engine.measure():
        table.trust(TRUSTED_SAMPLES)
    else:
        log.warning(
            "not measured: too slow for that, or stopped meanwhile; the fit learns from what it serves, and "
            "after %.0f s without requests it is tried again; until then `boosts node --capacity FILE` can "
            "tell the control plane what the node can do",
            IDLE_S,
        )


async def measure_while_idle(engine: Measurable, table: StepTable, idle: Callable[[], bool]) -> None:
    """Measure again whenever no step was made for `IDLE_S`, until canceled.

    A figure that is too low, because something else slowed the machine, would stay for ever: with it the
    control plane keeps the pool from going live, so nobody comes from whose steps the fit would learn better.
    As soon as the node is not `idle` it is called off. What is owed would not wait for it, but what is
    borrowed would: behind its prompts, in vLLM's queue, for the admission knows nothing of them. And a node
    that is being stopped would not end before them.
    """
    while True:
        steps = table.read().steps
        await asyncio.sleep(IDLE_S)
        if table.read().steps != steps or not idle():
            continue
        try:
            await _measure_while(idle, engine, table)
        except Exception:
            # Whatever it is must not end serving. Of a dead engine /healthz tells the agent.
            log.warning("could not measure again", exc_info=True)


async def _measure_while(idle: Callable[[], bool], engine: Measurable, table: StepTable) -> None:
    measuring = asyncio.create_task(measure(engine, table))
    try:
        while not measuring.done():
            await asyncio.wait([measuring], timeout=LOOK_S)
            if not measuring.done() and not idle():
                log.info("measuring is called off: the node is wanted, or stopped")
                return
        await measuring
    finally:
        # Canceled, it takes its requests back from the engine.
        measuring.cancel()
        await asyncio.gather(measuring, return_exceptions=True)


async def keep(file: CapacityFile, table: StepTable, model_id: str, capacity: Capacity) -> None:
    """Save the fit now and then until canceled, and once more then. Only one that began with a complete
    measurement: without a file the next start makes one."""
    try:
        while True:
            await asyncio.sleep(SAVE_S)
            # It waits for the disk; the streams must not.
            await asyncio.to_thread(_save, file, table, model_id, capacity)
    finally:
        _save(file, table, model_id, capacity)


def _save(file: CapacityFile, table: StepTable, model_id: str, capacity: Capacity) -> None:
    found = measured(table, model_id, capacity)
    _, samples = table.seed()
    if found is None or samples < TRUSTED_SAMPLES:
        return
    try:
        file.write(found)
    except OSError as error:
        # The next start measures again.
        log.warning("cannot save what was measured: %s", error)

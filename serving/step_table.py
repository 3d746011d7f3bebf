"""The table that serving's API process and its EngineCore share: seats go down, readings come up.

A file mapped by both. Each cell is one aligned double with a single writer, which a processor reads and
writes whole. A row is not read whole, which does no harm: a seat's terms are read again within some steps.

    start   mark, number of rows; then the readings of the step scheduler (EngineCore writes), the step time
            to begin with (the API process writes), the histogram of the own time (EngineCore writes)
    row i   guarantee, prefill rate, quantity, weight (the API process writes); held time (EngineCore writes)
"""

from __future__ import annotations

import mmap
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import NamedTuple, Self

from contract.step_time import StepTime
from scheduler.step_rules import UNLIMITED

ENVIRONMENT = "BOOSTS_STEP_TABLE"
"""Names the file to the EngineCore process. Not one of vLLM's options: those are part of what it keys its
compiled kernels by."""

ROWS = 16_384
NOBODY = 0
"""The row of sequences that belong to no seat: no guarantee, weight 1."""

TRUSTED_SAMPLES = 1_000.0
"""Samples that a fit counts for which was measured with batches of all sizes."""

OWN_TIME_US = (10.0, 25.0, 50.0, 100.0, 250.0, 1_000.0)
"""Upper bounds of the histogram of the step scheduler's own time; one more bucket is for the rest."""

_MARK = 1_112_363_859.0
_HEAD = 2
_READINGS = 64
_ROW = 5
_FIRST_ROW = _HEAD + _READINGS
_BYTES = 8 * (_FIRST_ROW + _ROW * ROWS)


class SeatRow(NamedTuple):
    """What EngineCore is told of a seat."""

    guarantee_tok_s: float
    prefill_tok_s: float
    quantity: float
    weight: float


@dataclass(frozen=True, slots=True)
class StepReadings:
    """What the step scheduler says of itself; counters are cumulative."""

    steps: float = 0.0
    held: float = 0.0
    """Sequences held at present."""
    borrowed_limit: float = UNLIMITED
    allowed_s: float = 0.0
    """Longest step that keeps everybody's pace; 0 while nobody is owed one."""
    preempted: float = 0.0
    """Times that a running sequence lost its slot or KV cache."""
    own_s: float = 0.0
    """CPU time spent in the step scheduler, beyond vLLM's own."""
    model_samples: float = 0.0
    model_error: float = 0.0
    base_s: float = 0.0
    prefill_token_s: float = 0.0
    decode_s: float = 0.0
    kv_token_s: float = 0.0
    experts_s: float = 0.0
    active_share: float = 0.0

    @property
    def step_time(self) -> StepTime:
        return StepTime(
            self.base_s,
            self.prefill_token_s,
            self.decode_s,
            self.kv_token_s,
            self.experts_s,
            self.active_share,
        )


_NAMES = {field.name: _HEAD + place for place, field in enumerate(fields(StepReadings))}
_BORROWED_LIMIT = _NAMES["borrowed_limit"]
_SEED = _HEAD + len(_NAMES)
_SEED_LENGTH = 7
_BUCKETS = _SEED + _SEED_LENGTH
assert _BUCKETS + len(OWN_TIME_US) + 1 <= _FIRST_ROW


class StepTable:
    """One mapping of the table.

    Invariant: the file is as long as the table, from before it is opened elsewhere.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        if len(memory) != _BYTES:
            raise ValueError(f"not a step table: {len(memory)} bytes and not {_BYTES}")
        self._cells = memoryview(memory).cast("d")
        if self._cells[0] != _MARK or self._cells[1] != ROWS:
            raise ValueError("not a step table of this version")

    @classmethod
    def create(cls, seed: StepTime, seed_samples: float) -> tuple[Self, Path]:
        """A new table and its file, which may be unlinked once EngineCore has opened it. `seed` is the step
        time to begin with, and counts for `seed_samples` samples. Raises OSError."""
        with tempfile.NamedTemporaryFile(prefix="boosts-steps-", delete=False) as file:
            file.truncate(_BYTES)
            memory = mmap.mmap(file.fileno(), 0)
        cells = memoryview(memory).cast("d")
        cells[0], cells[1] = _MARK, float(ROWS)
        table = cls(memory)
        for place, value in enumerate((*astuple(seed), seed_samples)):
            cells[_SEED + place] = value
        table.limit_borrowed(UNLIMITED)
        table.write_seat(NOBODY, SeatRow(0.0, 1.0, 1.0, 1.0))
        return table, Path(file.name)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map an existing table. Raises OSError, and ValueError for another version's."""
        with path.open("r+b") as file:
            return cls(mmap.mmap(file.fileno(), 0))

    def seed(self) -> tuple[StepTime, float]:
        """The step time to begin with, and the samples that it counts for."""
        values = self._cells[_SEED : _SEED + _SEED_LENGTH].tolist()
        return StepTime(*values[:-1]), values[-1]

    def trust(self, samples: float) -> None:
        """What EngineCore has learned by now was measured for the purpose, and counts for so many samples."""
        self._cells[_SEED + _SEED_LENGTH - 1] = samples

    # --- seats -------------------------------------------------------------------------------------

    def write_seat(self, row: int, seat: SeatRow) -> None:
        start = _FIRST_ROW + row * _ROW
        for place, value in enumerate(seat):
            self._cells[start + place] = value

    def read_seat(self, row: int) -> SeatRow:
        start = _FIRST_ROW + row * _ROW
        return SeatRow(*self._cells[start : start + _ROW - 1].tolist())

    def add_held(self, row: int, seconds: float) -> None:
        self._cells[_FIRST_ROW + row * _ROW + _ROW - 1] += seconds

    def held_s(self, row: int) -> float:
        """Sequence-seconds held since the table began, by all seats that ever had the row."""
        return self._cells[_FIRST_ROW + row * _ROW + _ROW - 1]

    # --- readings ----------------------------------------------------------------------------------

    def write(self, **readings: float) -> None:
        """Set the named fields of `StepReadings`."""
        for name, value in readings.items():
            self._cells[_NAMES[name]] = value

    def limit_borrowed(self, limit: float) -> None:
        """Set `borrowed_limit`, as the step scheduler does in each step: `write` takes longer."""
        self._cells[_BORROWED_LIMIT] = limit

    def count_own_time(self, took: Sequence[float]) -> None:
        """Count steps by the own time that each took, in seconds."""
        self._cells[_NAMES["own_s"]] += sum(took)
        self._cells[_NAMES["steps"]] += len(took)
        for seconds in took:
            self._cells[_BUCKETS + bisect_left(OWN_TIME_US, seconds * 1e6)] += 1

    def read(self) -> StepReadings:
        return StepReadings(*self._cells[_HEAD : _HEAD + len(_NAMES)].tolist())

    def borrowed_limit(self) -> int:
        return int(self._cells[_BORROWED_LIMIT])

    def own_time_counts(self) -> list[float]:
        """Steps by bucket of `OWN_TIME_US`."""
        return [float(count) for count in self._cells[_BUCKETS : _BUCKETS + len(OWN_TIME_US) + 1]]

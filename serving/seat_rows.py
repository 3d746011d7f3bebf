"""Which row of the step table belongs to which seat, kept by the API process."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from scheduler import SeatTerms
from serving.step_table import NOBODY, ROWS, SeatRow, StepTable


@dataclass(slots=True)
class _Place:
    row: int
    held_before_s: float
    """Held by those who had the row before."""


class SeatRows:
    """The seats of the node in the step table.

    Invariant: no two seats have one row. A row that was given back is used again last, long after
    EngineCore has forgotten whose it was.
    """

    def __init__(self, table: StepTable) -> None:
        self.table = table
        self._places: dict[str, _Place] = {}
        self._free = deque(range(NOBODY + 1, ROWS))

    def open(self, terms: SeatTerms) -> None:
        """The seat is inside its block, with these terms. Raises RuntimeError when all rows are taken."""
        place = self._places.get(terms.seat_id)
        if place is None:
            if not self._free:
                raise RuntimeError(f"more than {ROWS - 1} seats on one node")
            row = self._free.popleft()
            place = self._places[terms.seat_id] = _Place(row, self.table.held_s(row))
        self.table.write_seat(
            place.row, SeatRow(terms.guarantee_tok_s, terms.prefill_tok_s, terms.quantity, terms.weight)
        )

    def close(self, seat_id: str) -> None:
        """The seat's block is over: what runs of it is borrowed work from now on."""
        place = self._places.get(seat_id)
        if place is not None:
            was = self.table.read_seat(place.row)
            self.table.write_seat(place.row, SeatRow(0.0, was.prefill_tok_s, was.quantity, was.weight))

    def forget(self, seat_id: str) -> None:
        """The seat is gone, and nothing of it runs."""
        place = self._places.pop(seat_id, None)
        if place is not None:
            self._free.append(place.row)

    def row(self, seat_id: str) -> int:
        place = self._places.get(seat_id)
        return NOBODY if place is None else place.row

    def held_s(self, seat_id: str) -> float:
        """Sequence-seconds that the seat's requests were held."""
        place = self._places.get(seat_id)
        return 0.0 if place is None else max(0.0, self.table.held_s(place.row) - place.held_before_s)

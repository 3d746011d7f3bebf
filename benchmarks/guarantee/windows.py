"""Busy one-second windows of a stream that holds a guarantee. Pure.

A window is a whole second in which the stream was unfinished and past its first token all the time, so
it is owed exactly its guarantee. A stream's windows follow each other from its first token, or from the
beginning of the measurement if that came later; the rest of less than a second at its end counts
nowhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from benchmarks.guarantee.bench import LedgerReading
from benchmarks.load import RequestRecord

KEPT = 0.95
"""A window is kept if this share of what was owed in it was delivered."""


def delivered_by_window(record: RequestRecord, start_s: float, end_s: float) -> list[int]:
    """Tokens that came in each of the stream's busy windows between two moments of the phase."""
    if record.first_token_s is None or record.timeline is None or record.finished_s is None:
        return []
    times = [at_s for at_s, _ in record.timeline]
    tokens = [count for _, count in record.timeline]

    def by(moment_s: float) -> int:
        seen = bisect_right(times, moment_s)
        return tokens[seen - 1] if seen else 0

    first_s, last_s = max(record.first_token_s, start_s), min(record.finished_s, end_s)
    borders = [first_s + number for number in range(int(max(0.0, last_s - first_s)) + 1)]
    return [by(after) - by(before) for before, after in pairwise(borders)]


def attained_by_reading(
    readings: Sequence[LedgerReading], guarantee_tok_s: float, start_s: float, end_s: float
) -> list[float]:
    """Delivered over owed between readings of the node's own ledger, where the whole time was owed."""
    attained = []
    for before, after in pairwise(readings):
        owed = after.owed_tokens - before.owed_tokens
        busy = owed >= 0.99 * guarantee_tok_s * (after.at_s - before.at_s)
        if start_s <= before.at_s and after.at_s <= end_s and busy and owed > 0:
            attained.append((after.output_tokens - before.output_tokens) / owed)
    return attained


def kept(attained: Sequence[float]) -> int:
    """How many windows got at least 95 % of what they were owed."""
    return sum(share >= KEPT for share in attained)

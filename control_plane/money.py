"""Money: integer cents inside, a string with two decimals outside."""

from __future__ import annotations

HOURS = 8
"""In a block."""


def show(cents: int) -> str:
    """`2700` as `27.00`."""
    return f"{cents // 100}.{cents % 100:02}"


def slot_price(block_cents: int, hour: int) -> int:
    """Cents of a block's price that fall to its hour `hour` (0-7): rounded, and adding up to the price.

    The difference of rounded running totals, so that 27.00 is 3.38, 3.37, 3.38, ...
    """
    return (2 * block_cents * (hour + 1) + HOURS) // 16 - (2 * block_cents * hour + HOURS) // 16

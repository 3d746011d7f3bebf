"""What the control plane asks of a payment provider. One narrow seam: three calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Card:
    """What may be shown of a card on file."""

    brand: str
    last4: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a charge ended."""

    decline_code: str | None
    """None when it was paid; else the provider's reason, such as `insufficient_funds`."""

    @property
    def paid(self) -> bool:
        return self.decline_code is None


class UnknownPaymentMethod(Exception):  # noqa: N818 - names what happened
    """The provider does not know this payment method."""


class GatewayUnavailable(Exception):  # noqa: N818 - names what happened
    """The provider cannot be reached; whether the call took effect is unknown. Repeat it later."""


class PaymentGateway(Protocol):
    """Moves money. Every call may be repeated with the same arguments and takes effect once.

    Each raises GatewayUnavailable.
    """

    async def attach(self, token: str) -> Card:
        """Look a payment method up, to put it on file. Raises UnknownPaymentMethod."""

    async def charge(self, idempotency_key: str, token: str, amount_cents: int, description: str) -> Outcome:
        """Take `amount_cents` (USD) from the card without its owner present."""

    async def refund(self, idempotency_key: str) -> None:
        """Undo the charge of that key; if it has not been made, see to it that it never will be."""

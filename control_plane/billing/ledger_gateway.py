"""The embedded payment gateway: a book instead of a bank, for demos, tests and private pools.

It knows Stripe's test payment methods by their names (docs.stripe.com/testing), so that what works
here works there. Unlike Stripe's, a card that will be declined can be put on file: the decline
comes with the charge, where it belongs. No money moves; every call is kept in `ledger_entries`.
"""

from __future__ import annotations

from sqlalchemy.exc import IntegrityError

from control_plane.billing.gateway import Card, Outcome, UnknownPaymentMethod
from control_plane.billing.tables import LedgerEntry
from control_plane.clock import Clock
from control_plane.database import Database

_GOOD = {
    "pm_card_visa": Card("visa", "4242"),
    "pm_card_visa_debit": Card("visa", "5556"),
    "pm_card_mastercard": Card("mastercard", "4444"),
    "pm_card_mastercard_debit": Card("mastercard", "8210"),
    "pm_card_mastercard_prepaid": Card("mastercard", "5100"),
    "pm_card_amex": Card("amex", "8431"),
    "pm_card_discover": Card("discover", "9424"),
    "pm_card_diners": Card("diners", "0004"),
    "pm_card_jcb": Card("jcb", "0505"),
    "pm_card_unionpay": Card("unionpay", "0005"),
}
_DECLINED = {
    "pm_card_chargeDeclined": "generic_decline",
    "pm_card_visa_chargeDeclined": "generic_decline",
    "pm_card_chargeCustomerFail": "generic_decline",
    "pm_card_chargeDeclinedInsufficientFunds": "insufficient_funds",
    "pm_card_visa_chargeDeclinedInsufficientFunds": "insufficient_funds",
    "pm_card_chargeDeclinedLostCard": "lost_card",
    "pm_card_visa_chargeDeclinedLostCard": "lost_card",
    "pm_card_chargeDeclinedStolenCard": "stolen_card",
    "pm_card_visa_chargeDeclinedStolenCard": "stolen_card",
    "pm_card_chargeDeclinedExpiredCard": "expired_card",
    "pm_card_chargeDeclinedIncorrectCvc": "incorrect_cvc",
    "pm_card_chargeDeclinedProcessingError": "processing_error",
    "pm_card_authenticationRequired": "authentication_required",
}


class LedgerGateway:
    """A PaymentGateway that keeps book in our own database, in transactions of its own."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def attach(self, token: str) -> Card:
        if token in _GOOD:
            return _GOOD[token]
        if token in _DECLINED:
            return Card("visa", "0002")
        raise UnknownPaymentMethod(f"no such payment method; use one of {', '.join([*_GOOD, *_DECLINED])}")

    async def charge(self, idempotency_key: str, token: str, amount_cents: int, description: str) -> Outcome:
        entry = await self._entry(idempotency_key, token, amount_cents, refunded=False)
        return Outcome("canceled" if entry.refunded else entry.decline_code)

    async def refund(self, idempotency_key: str) -> None:
        await self._entry(idempotency_key, "", 0, refunded=True)
        async with self._database.write() as session:
            entry = await session.get_one(LedgerEntry, idempotency_key, with_for_update=True)
            entry.refunded = True

    async def _entry(self, key: str, token: str, amount_cents: int, *, refunded: bool) -> LedgerEntry:
        """The entry with this key, made if it is not there: the first call decides."""
        try:
            async with self._database.write() as session:
                entry = await session.get(LedgerEntry, key)
                if entry is None:
                    entry = LedgerEntry(
                        idempotency_key=key,
                        token=token,
                        amount_cents=amount_cents,
                        decline_code=_DECLINED.get(token),
                        refunded=refunded,
                        created_at=self._clock(),
                    )
                    session.add(entry)
                return entry
        except IntegrityError:
            # Two made it at once: the other one's is the entry.
            async with self._database.read() as session:
                return await session.get_one(LedgerEntry, key)

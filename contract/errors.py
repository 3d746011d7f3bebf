"""One error for everything that does not keep to the contract; it says what is wrong, and where."""

from __future__ import annotations

from pydantic import ValidationError

_SHOWN = 5


class ContractError(ValueError):
    """A document that does not keep to the contract."""

    @classmethod
    def from_validation(cls, document: str, error: ValidationError) -> ContractError:
        """Name the document, then each fault by its path: `entitlements: pledges.0.quantity: ...`."""
        faults = []
        for fault in error.errors(include_url=False, include_context=False)[:_SHOWN]:
            path = ".".join(str(part) for part in fault["loc"]) or "document"
            # Somebody may have pasted the key where its hash belongs; a log is no place for it.
            got = "not shown" if "key" in path else repr(fault["input"])[:80]
            faults.append(f"{path}: {fault['msg']} (got {got})")
        left_out = error.error_count() - len(faults)
        if left_out > 0:
            faults.append(f"and {left_out} more")
        return cls(f"{document}: " + "; ".join(faults))

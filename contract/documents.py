"""What all documents that cross a process border have in common: strict, frozen, parsed once."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from contract.errors import ContractError


class Document(BaseModel):
    """A part of such a document: nothing unknown, nothing converted, nothing changed afterwards."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, text: str | bytes, name: str) -> Self:
        """Parse JSON. Raises ContractError, which calls the document `name` and each fault by its path."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ContractError.from_validation(name, error) from None

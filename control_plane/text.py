"""Text that comes from outside and goes into a database."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from pydantic import AfterValidator, Field


def _storable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain NUL characters")
    # JSON can spell lone surrogates, which no database keeps; UnicodeEncodeError is a ValueError.
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_storable)]
"""Text that a database can keep."""

Reference = Annotated[Text, Path(description="Id or slug")]
"""How an address names a pool or a pledge."""

Name = Annotated[Text, Field(min_length=1, max_length=200)]

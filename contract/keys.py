"""The format of our keys: a prefix that says what it opens, 256 random bits, and a checksum.

The checksum lets a scanner, a form or a node tell a mistyped key from an unknown one without a
look-up. Only the SHA-256 of a key is stored to recognise it: with 256 random bits there is nothing
to guess.
"""

from __future__ import annotations

import enum
import hashlib
import secrets
import zlib

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_LENGTH = 43
_CHECKSUM_LENGTH = 6


class KeyKind(enum.Enum):
    """What a key opens, by its prefix."""

    BOOST = "sk_pool_"
    """Inference, for one pledge."""
    MANAGEMENT = "mk_"
    """The pools API, for one account."""
    JOIN = "join_"
    """The enrolment of one node, once."""
    NODE = "node_"
    """The agent API, for one node."""


def new_key(kind: KeyKind) -> str:
    """A fresh key."""
    body = kind.value + _base62(secrets.randbits(256), _SECRET_LENGTH)
    return body + _checksum(body)


def is_key(text: str, kind: KeyKind) -> bool:
    """Whether `text` has the form of such a key and its checksum is right."""
    expected_length = len(kind.value) + _SECRET_LENGTH + _CHECKSUM_LENGTH
    if len(text) != expected_length or not text.startswith(kind.value) or not text.isascii():
        return False
    return _checksum(text[:-_CHECKSUM_LENGTH]) == text[-_CHECKSUM_LENGTH:]


def key_sha256(key: str) -> str:
    """What is stored instead of the key: 64 hex digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), _CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))

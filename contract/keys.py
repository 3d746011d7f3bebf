"""The format of our keys: a prefix that says what it opens, 256 random bits, and a checksum.

The checksum lets a scanner, a form or a node tell a mistyped key from an unknown one without a
look-up. A node stores only the SHA-256 of a key: with 256 random bits there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import secrets
import zlib

BOOST_KEY_PREFIX = "sk_pool_"

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_LENGTH = 43
_CHECKSUM_LENGTH = 6


def new_boost_key() -> str:
    """A fresh inference key."""
    body = _base62(secrets.randbits(256), _SECRET_LENGTH)
    return BOOST_KEY_PREFIX + body + _checksum(BOOST_KEY_PREFIX + body)


def is_boost_key(text: str) -> bool:
    """Whether `text` has the form of an inference key and its checksum is right."""
    expected_length = len(BOOST_KEY_PREFIX) + _SECRET_LENGTH + _CHECKSUM_LENGTH
    if len(text) != expected_length or not text.startswith(BOOST_KEY_PREFIX) or not text.isascii():
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

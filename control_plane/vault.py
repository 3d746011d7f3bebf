"""Encryption at rest: AES-256-GCM, with the row's own id bound in, so that none can take another's place."""

from __future__ import annotations

import base64
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12
_KEY_BYTES = 32


class VaultError(Exception):
    """The encryption key is missing or is not the one that encrypted the data."""


class Vault:
    """Encrypts and decrypts with one 256-bit key."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == _KEY_BYTES
        self._cipher = AESGCM(key)

    @classmethod
    def from_text(cls, text: str) -> Vault:
        """From base64 of 32 bytes. Raises VaultError."""
        try:
            key = base64.b64decode(text.strip(), validate=True)
        except ValueError:
            key = b""
        if len(key) != _KEY_BYTES:
            raise VaultError("the encryption key must be 32 bytes in base64: openssl rand -base64 32")
        return cls(key)

    @classmethod
    def from_file(cls, path: Path) -> Vault:
        """From a file that is made, readable for its owner only, if it is not there. Raises VaultError."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return cls.from_text(path.read_text())
        key = base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode()
        with os.fdopen(descriptor, "w") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())
        return cls.from_text(key)

    def encrypt(self, text: bytes, bound_to: str) -> bytes:
        """Nonce and ciphertext of `text`; only whoever names `bound_to` again can read it."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, text, bound_to.encode())

    def decrypt(self, sealed: bytes, bound_to: str) -> bytes:
        """The inverse of `encrypt`. Raises VaultError."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], bound_to.encode())
        except InvalidTag:
            raise VaultError(
                "the database was encrypted with another key: give its own (BOOSTS_ENCRYPTION_KEY, or "
                "encryption.key in --home)"
            ) from None

"""Entitlements come from a file; its changes are followed.

Disk is the interface: whoever writes it (an operator, the agent) replaces the file whole, and either
side may restart alone. A version that is invalid, empty, or older than the one in use is refused and
logged once; the last good one stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from contract.entitlements import Entitlements, parse_entitlements
from contract.errors import ContractError

POLL_S = 0.25
MAX_BYTES = 64 * 1024 * 1024

log = logging.getLogger("boosts.entitlements")


class EntitlementsFile:
    """The newest good snapshot of a file. Polls, which sees replaced files on every filesystem."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.current: Entitlements | None = None
        self.refused = 0
        """Versions refused since start."""
        self._seen: tuple[int, int, int] | None = None

    def load(self) -> Entitlements:
        """Read the first snapshot. Raises ContractError or OSError: there is nothing to fall back on."""
        self._seen = self._stamp()
        self.current = self._read()
        return self.current

    def poll(self) -> Entitlements | None:
        """The new snapshot if the file has a good one that is newer; None if nothing changed for us."""
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return None
            self._seen = stamp
            snapshot = self._read()
            self._refuse_older(snapshot)
        except (ContractError, OSError) as error:
            self.refused += 1
            log.error("kept the entitlements in use, revision %s: %s", self._revision(), error)
            return None
        self.current = snapshot
        log.info("entitlements revision %d: %d pledges", snapshot.revision, len(snapshot.pledges))
        return snapshot

    async def follow(self, apply: Callable[[Entitlements], None]) -> None:
        """Call `apply` with each new snapshot, until canceled."""
        while True:
            await asyncio.sleep(POLL_S)
            snapshot = self.poll()
            if snapshot is not None:
                apply(snapshot)

    def _stamp(self) -> tuple[int, int, int]:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return (0, 0, 0)
        # The change time too: a file that was unreadable is tried again after its mode was mended.
        return (status.st_ctime_ns, status.st_size, status.st_ino)

    def _read(self) -> Entitlements:
        with self.path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ContractError(f"entitlements: larger than {MAX_BYTES // 2**20} MiB")
        return parse_entitlements(content)

    def _refuse_older(self, snapshot: Entitlements) -> None:
        current = self.current
        if current is None or snapshot.store_id != current.store_id or snapshot.revision > current.revision:
            return
        if snapshot != current:
            raise ContractError(
                f"entitlements: revision {snapshot.revision} is not newer than {current.revision}; "
                "each change needs a higher revision"
            )

    def _revision(self) -> int:
        return 0 if self.current is None else self.current.revision

"""The node's orders on its disk, so that it serves whether or not the control plane is there.

`orders.json` is what the node follows, `orders.previous.json` what it followed before, and
`entitlements.json` the part that serving reads and follows by itself.
"""

from __future__ import annotations

import logging
from pathlib import Path

from agent.home import write_whole
from contract.entitlements import Entitlements, parse_entitlements
from contract.errors import ContractError
from contract.nodes import Orders

log = logging.getLogger("boosts.agent")


class OrdersStore:
    """The orders in force.

    Invariants: `current` lies whole on the disk, entitlements included, before anybody acts on it; of
    one store its revision only grows; once there are orders, there is always a good file of some.
    """

    def __init__(self, home: Path) -> None:
        self.current: Orders | None = None
        self.entitlements = home / "entitlements.json"
        self._latest = home / "orders.json"
        self._previous = home / "orders.previous.json"

    @property
    def store_id(self) -> str:
        return "" if self.current is None else self.current.entitlements.store_id

    @property
    def revision(self) -> int:
        return 0 if self.current is None else self.current.entitlements.revision

    def load(self) -> None:
        """Take over what an earlier agent left: the latest orders, or the previous if those are damaged."""
        self.current = _read(self._latest)
        if self.current is None:
            self.current = _read(self._previous)
            if self.current is not None:
                log.warning("no good orders.json: following the previous orders, revision %d", self.revision)
        if self.current is not None:
            self._publish(self.current.entitlements)

    def accept(self, orders: Orders) -> bool:
        """Follow them from now on; False if they are those in force. Raises ContractError or OSError."""
        if orders == self.current:
            return False
        self._refuse_older(orders)
        if self.current is not None:
            write_whole(self._previous, self.current.model_dump_json(indent=2))
        write_whole(self._latest, orders.model_dump_json(indent=2))
        self._publish(orders.entitlements)
        self.current = orders
        return True

    def _refuse_older(self, orders: Orders) -> None:
        revision = orders.entitlements.revision
        if orders.entitlements.store_id == self.store_id and revision <= self.revision:
            raise ContractError(
                f"orders: revision {revision} is not newer than {self.revision}; "
                "each change needs a higher revision"
            )

    def _publish(self, entitlements: Entitlements) -> None:
        """Hand them to serving, unless it has them, or newer ones than a previous file holds."""
        try:
            known = parse_entitlements(self.entitlements.read_bytes())
        except (ContractError, OSError):
            known = None
        if known is None or known.store_id != entitlements.store_id or known.revision < entitlements.revision:
            write_whole(self.entitlements, entitlements.to_json())


def _read(path: Path) -> Orders | None:
    try:
        return Orders.parse(path.read_bytes(), path.name)
    except FileNotFoundError:
        return None
    except (ContractError, OSError) as error:
        log.error("%s", error)
        return None

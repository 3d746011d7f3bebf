"""What every part of the control plane works with, made once and handed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from control_plane.billing.gateway import PaymentGateway
from control_plane.clock import Clock
from control_plane.database import Database
from control_plane.vault import Vault


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """One control plane: its database, its clock, its money, its secrets."""

    database: Database
    clock: Clock
    gateway: PaymentGateway
    vault: Vault
    public_url: str
    """Where customers reach it, without a trailing slash."""


def _context(request: Request) -> ControlPlane:
    context: ControlPlane = request.app.state.control_plane
    return context


Context = Annotated[ControlPlane, Depends(_context)]
"""For routes: the control plane that the application was made for."""

"""What a node's agent and the control plane tell each other, under `/internal`.

The agent dials out; nothing dials in. It enrols once with a join token, registers at every start and
gets an **epoch**: whoever writes with an older epoch has been replaced and is refused (409
`stale_epoch`); with one that was never given out, because the database is a restored copy, it registers
again (409 `unknown_epoch`). **Orders** are always the whole of what the node shall do, fetched by long poll.
Every answer is `{"success": true, "data": <one of these>}`, every error the pools API's envelope.

| call | body | data |
|---|---|---|
| POST /internal/enrol | Enrolment, without authentication | Enrolled |
| POST /internal/register | Registration | Registered |
| POST /internal/heartbeat | Heartbeat, every 10 s | Acknowledged |
| GET /internal/orders?epoch&store_id&revision&wait_s | | Orders, or 204 if nothing is newer after `wait_s` |
| POST /internal/reports | ReportBatch | ReportsStored |

All but the first carry `Authorization: Bearer node_...`. Without orders yet, `store_id` is empty and
`revision` 0.
"""

from __future__ import annotations

import enum
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import AwareDatetime, Field

from contract.capacity import NodeCapacity
from contract.documents import Document
from contract.entitlements import Entitlements, Name
from contract.reports import ThroughputReport

HEARTBEAT_S = 10.0
UNREADY_S = 40.0
"""A node that was not heard of for this long does not count as ready."""
MAX_WAIT_S = 30.0
"""The longest a request for orders is held."""
MAX_REPORTS = 100
"""The most reports of one batch."""

Data = TypeVar("Data")
Epoch = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class Answer(Document, Generic[Data]):
    """The envelope of a success."""

    success: Literal[True]
    data: Data


class Enrolment(Document):
    """A new node introduces itself."""

    join_token: str
    name: Name
    """For people: the host's name, say."""


class Enrolled(Document):
    """Who it is from now on. The token is shown this once."""

    node_id: Name
    node_token: str
    pool_slug: Name


class Registration(Document):
    """An agent has started."""

    boot_id: Name
    """One start of one agent: registering twice with it gives the same epoch."""
    base_url: Annotated[str, Field(pattern=r"^https?://", max_length=500)]
    """Where customers reach the node's inference endpoints."""


class Registered(Document):
    epoch: Epoch
    at: AwareDatetime
    """The control plane's clock."""


class ServingState(enum.Enum):
    """What the node's serving process is doing."""

    STOPPED = "stopped"
    """Not wanted, and not running."""
    STARTING = "starting"
    """Loading the model."""
    READY = "ready"
    """Takes requests."""
    DRAINING = "draining"
    """Lets running requests finish, then stops."""
    FAILED = "failed"
    """Ended by itself; waits to be started again."""


class GpuFigures(Document):
    """One GPU as NVML reports it; null is what it does not measure (a slice of a GPU, some cards)."""

    name: Name
    memory_used_bytes: Count
    memory_total_bytes: Count
    utilization_percent: Annotated[int, Field(ge=0, le=100)] | None
    power_watts: Annotated[float, Field(ge=0)] | None
    temperature_celsius: Count | None


class Heartbeat(Document):
    """A sign of life, and the state of the node."""

    epoch: Epoch
    serving: ServingState
    model_id: str | None
    """The model being served, or loaded; null when stopped."""
    revision: Count
    """Of the orders that the node follows; 0 for none."""
    restarts: Count
    """Starts of serving that followed an unwanted end, since the agent started."""
    spooled_reports: Count
    clock_offset_ms: float | None
    """This node's clock minus the control plane's; null until measured."""
    gpus: Annotated[tuple[GpuFigures, ...], Field(max_length=64)]
    problem: Annotated[str, Field(max_length=2000)] | None
    """Why it is not ready, for people; the last lines of serving's log, say."""
    capacity: NodeCapacity | None = None
    """What the node has measured of itself; null where that is not known, or not yet."""


class Acknowledged(Document):
    at: AwareDatetime
    """The control plane's clock."""


class Orders(Document):
    """The whole of what a node shall do. `entitlements` carries the store's id and the revision."""

    version: Literal[1]
    serve: bool
    """Whether serving shall run; false while the pool collects pledges, and to drain the node."""
    model_id: Annotated[str, Field(pattern=r"^[^-\s]", max_length=500)]
    """Of the pool; also the name customers use for it."""
    engine_flags: tuple[str, ...]
    """vLLM's, as the pool's operator gave them."""
    entitlements: Entitlements


class ReportBatch(Document):
    """Throughput reports, oldest first. Sent at least once, stored once."""

    epoch: Epoch
    reports: Annotated[tuple[ThroughputReport, ...], Field(min_length=1, max_length=MAX_REPORTS)]


class ReportsStored(Document):
    stored: Count
    duplicates: Count
    """Had been stored before, or were overtaken by a later one of the same boot."""

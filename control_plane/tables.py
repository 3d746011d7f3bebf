"""Every table, so that the metadata is whole for migrations."""

import control_plane.accounts.tables
import control_plane.billing.tables
import control_plane.keys.tables
import control_plane.nodes.tables
import control_plane.pledges.tables
import control_plane.pools.tables
import control_plane.throughput.tables  # noqa: F401 - registers itself
from control_plane.database import Table

metadata = Table.metadata

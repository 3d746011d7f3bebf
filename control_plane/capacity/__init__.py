"""Capacity: what nodes can do, what may be sold of it, and the alarms when it is not there."""

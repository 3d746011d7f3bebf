"""Pledges: reserving seats, and their life from the hold to the last paid day."""

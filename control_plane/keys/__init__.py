"""Boost keys: made at activation, stored encrypted, shown to their owner."""

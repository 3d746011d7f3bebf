"""Pools: one model, its blocks and prices, its seats."""

"""Nodes: how they join, what they are told, what they report about themselves."""

"""Accounts and their management keys."""

"""The control plane: the pools API, money, keys, and what nodes shall do.

A folder per noun, each with its routes (HTTP), service (rules) and tables. Rules read the time from
an injected clock and never call the payment provider inside a transaction.
"""

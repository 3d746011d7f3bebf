"""What crosses a process border: entitlements, throughput reports, block arithmetic, key format.

Versioned JSON, parsed strictly and once. Imports nothing else of ours.
"""

"""The node agent: starts, watches and drains serving, syncs entitlements, reports throughput.

It dials out to the control plane and lives without it: what it must know to serve lies in its home,
and so does what it still has to report. Never imports vLLM, the scheduler or serving.
"""

"""vLLM with seats: the node's one public door.

`gateway` (HTTP: keys, blocks, limits, envelopes) and `node` (queues, entitlements, counters) know
nothing of vLLM; `engine` and `launch` are the only modules that import it.
"""

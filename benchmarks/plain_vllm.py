"""`python -m benchmarks.plain_vllm FLAGS`: vLLM's own API server, as it comes.

All that is added is a request to the kernel without which vLLM 0.32 dies of an illegal instruction on a CPU
that has tile instructions, if the model is small: `serving/tiles.py` tells why, and does without torch.
"""

import runpy

import torch

if __name__ in ("__main__", "__mp_main__"):  # the second in every process that it spawns
    torch.cpu._init_amx()
if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")

"""The step scheduler on a CUDA vLLM: Qwen3-8B as published, with dummy weights; nothing is downloaded.

Pace and time per step depend on the architecture and not on what the weights say. Both servers share one
GPU and are measured in turns, as on the CPU; `benchmarks/guarantee/` says what each row measures.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import guarantee
from benchmarks.load import Lengths
from benchmarks.report import Result

ROWS = ("pace", "total", "lone", "isolation", "step-time")

# Qwen/Qwen3-8B's config.json on Hugging Face, 2025-04.
_QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_CONTEXT_TOKENS = 8192
_KV_GIB = 18
"""For each of the two engines: 131,000 tokens at Qwen3-8B's 144 KiB, so 256 streams of 500."""
_FLAGS = (
    "--load-format=dummy",
    f"--max-model-len={_CONTEXT_TOKENS}",
    f"--kv-cache-memory-bytes={_KV_GIB * 2**30}",
    # The share of the GPU that must be free at the start: two engines of 16 GiB of weights fit in 80 GiB.
    "--gpu-memory-utilization=0.45",
)


_LEAST_GIB = 75
"""Free GPU memory for both engines: an 80 GB card has a little less in GiB."""


def missing_gpu() -> str | None:
    """Why this cannot run here; None if it can."""
    import torch

    if not torch.cuda.is_available():
        why = "no CUDA GPU here (torch.cuda.is_available() is false)"
    elif (free_gib := torch.cuda.mem_get_info()[0] / 2**30) < _LEAST_GIB:
        why = f"the GPU has {free_gib:.0f} GiB of memory free; both engines need {_LEAST_GIB}"
    else:
        return None
    return (
        f"{why}. On a machine with one of 80 GB or more: "
        "pip install -r requirements/gpu.txt, then python -m benchmarks gpu"
    )


def write_model(folder: Path) -> Path:
    """Write Qwen3-8B's config and a tokenizer of its size, one made-up word per id; returns the folder.

    Words mean nothing to dummy weights, but every id that they produce must have one.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    if (folder / "config.json").exists():
        return folder
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    words = {f"w{number}": number for number in range(_QWEN3_8B["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(building / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _CONTEXT_TOKENS,
        "eos_token": f"w{_QWEN3_8B['eos_token_id']}",
    }
    (building / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (building / "config.json").write_text(json.dumps(_QWEN3_8B, indent=1))
    building.rename(folder)
    return folder


def gpu_config(folder: Path) -> guarantee.Config:
    """The guarantee scenario at a GPU's size, long enough for pace and isolation to prove their targets;
    those of `total` and `lone` hold for one pair of processes."""
    return guarantee.Config(
        model=str(write_model(folder / "qwen3-8b")),
        folder=folder,
        only=ROWS,
        max_num_seqs=272,
        eager=False,
        engine_flags=_FLAGS,
        start_together=False,
        start_timeout_s=240.0,
        warm_s=1.5,
        warm_tokens=0,
        noisy_streams=256,
        noisy_output=Lengths(128, 384),
        calibration_s=3.0,
        pace_rounds=10,
        pace_s=44.0,
        fixed_s=4.0,
        # Loading takes minutes.
        starts=1,
        pairs=10,
        pair_s=3.0,
        pair_warm_s=1.5,
        lone_streams=192,
        lone_many_streams=400,
        isolation_rounds=10,
        beside_s=21.0,
        solo_s=12.0,
        step_s=8.0,
    )


def run(config: guarantee.Config, progress: Callable[[str], None]) -> Result:
    """Measure the rows. Raises ServerStartError when a server does not start."""
    return guarantee.run(config, progress, scenario="gpu")

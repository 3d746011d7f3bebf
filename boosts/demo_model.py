"""A tiny Qwen3 with seeded random weights: it talks nonsense fast, and everything around it is real.

Built locally in seconds and never downloaded, so that a fresh machine without a model hub can run the
whole product. Any Hugging Face model id or folder can take its place (`boosts run --model`).
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

VOCAB_SIZE = 2048
CONTEXT_TOKENS = 8192
SEED = 20260101

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def build_demo_model(folder: Path, width: int = 1) -> Path:
    """Write config, weights, tokenizer and chat template to `folder`; an existing build is kept.

    Every layer is `width` times as wide: the larger, the more of a step's time is spent on each sequence.

    The build happens beside the target and is moved into place whole, so an interrupted build never
    leaves half a model behind. Returns `folder`.
    """
    if (folder / "config.json").exists():
        return folder
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    _write_tokenizer(building)
    _write_weights(building, width)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return folder


def _training_text() -> Iterator[str]:
    """English-like text that every Python ships: its own standard library's sources."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for source in sorted(stdlib.glob("*.py"))[:60]:
        yield source.read_text(encoding="utf-8", errors="ignore")


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_TOKENS,
        "pad_token": PAD,
        "eos_token": TURN_END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _write_weights(folder: Path, width: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128 * width,
        intermediate_size=256 * width,
        num_hidden_layers=2,
        num_attention_heads=4 * width,
        num_key_value_heads=2 * width,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.bfloat16()
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)

"""A tiny Llama with random weights and a word tokenizer, made on the spot, for tests that need a real model quickly."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own form (ChatML), without its default system prompt."""

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tiny_model(folder: Path, *, seed: int = 0, tie_embeddings: bool = True) -> Path:
    """Write a transformers directory: 2 layers, width 64, a byte tokenizer of 259 tokens, ChatML template.

    The tokenizer encodes any text, one token a byte; its ids are stable, since BPE is trained on no text at all.

    Args:
        folder: Where to write; made if missing.
        seed: Of the random weights.
        tie_embeddings: Whether the output head shares the input embedding's weight, as in SmolLM2.

    Returns:
        The folder, for `path:` sources.
    """
    tokenizer = _make_tokenizer()
    config = LlamaConfig(
        vocab_size=320,  # a multiple of 64; ids from len(tokenizer) on are never produced
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # large enough that logits differ visibly between tokens
        tie_word_embeddings=tie_embeddings,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_counting(path: Path, count: int = 80) -> Path:
    """Write questions with answers that the model learns within a few steps, one JSON object a line."""
    rows = ({"prompt": f"Count to {number}.", "completion": f"Here are {number} numbers."} for number in range(count))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _make_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )

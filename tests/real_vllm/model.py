"""`python -m tests.real_vllm.model FOLDER`, in vLLM's environment: writes the tiny random model of docs/real-vllm.md.

It has GPT-2's byte-level BPE with ChatML's marks (50,259 tokens) and a Llama of two layers with 7 million random
parameters, the same each time. `$GPT2` holds encoder.json and vocab.bpe, `$TEMPLATE` is the chat template.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 2048


def main(folder: str) -> None:
    gpt2 = Path(os.environ["GPT2"])
    lines = (gpt2 / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    merges = [(left, right) for left, right in (line.split() for line in lines if line.strip())]
    tokenizer = Tokenizer(models.BPE(vocab=json.loads((gpt2 / "encoder.json").read_bytes()), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=marks[0],
        bos_token=marks[0],
        eos_token=marks[2],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    fast.chat_template = Path(os.environ["TEMPLATE"]).read_text(encoding="utf-8")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    main(sys.argv[1])

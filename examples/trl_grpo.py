"""GRPO with TRL on grpo_kernels: the import and the name of the trainer are all that differs from TRL alone.

    python examples/trl_grpo.py                                  # a tiny random model, no network
    python examples/trl_grpo.py --model Qwen/Qwen3-0.6B --steps 100

Needs `pip install trl==1.16.0`.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from grpo_kernels.integrations.trl import GRPOKernelsTrainer


def policy(name: str | None) -> tuple[Any, Any]:
    """The model (or its name, which the trainer loads) and its tokenizer."""
    if name is not None:
        return name, AutoTokenizer.from_pretrained(name, padding_side="left")
    words = ["<pad>", "<eos>", *(str(i) for i in range(100))]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>")
    tokenizer.padding_side = "left"
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def digits(completions: list[str], **_: Any) -> list[float]:
    """The share of characters that are digits above 4: something that any model can learn."""
    return [sum(c.isdigit() and int(c) > 4 for c in text) / max(1, len(text)) for text in completions]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of the Hub, or a folder")
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


def config(steps: int, **options: Any) -> GRPOConfig:
    return GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=8, num_generations=8,
        max_completion_length=16, learning_rate=1e-3, logging_steps=1, report_to="none", save_strategy="no",
        bf16=torch.cuda.is_available(), **options,
    )  # fmt: skip


PROMPTS = Dataset.from_list([{"prompt": f"{i} {i + 1} {i + 2}"} for i in range(50)])

if __name__ == "__main__":
    chosen = arguments()
    model, tokenizer = policy(chosen.model)
    trainer = GRPOKernelsTrainer(
        model, reward_funcs=digits, args=config(chosen.steps), train_dataset=PROMPTS, processing_class=tokenizer
    )
    trainer.train()
    print(trainer.step_counts)

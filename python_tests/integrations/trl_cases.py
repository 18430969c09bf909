"""Tiny models, prompts and trainers: the same run by TRL's trainer and by ours, step by step. No network."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 97
SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(3, VOCAB)} | {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **options}), dtype=dtype)
    with torch.no_grad():  # a head that has opinions: small random weights give a uniform policy
        head = model.get_output_embeddings().weight
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    model.generation_config.eos_token_id = 2
    return model


def prompts() -> Dataset:
    return Dataset.from_list(
        [{"prompt": " ".join(f"w{3 + (7 * i + j) % 90}" for j in range(3 + i % 4))} for i in range(8)]
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    return [sum(int(word[1:]) % 7 for word in text.split() if word[1:].isdigit()) / 10 for text in completions]


def build(
    trainer: type, config: type, model: Any, *, peft: Any = None, ours: dict[str, Any] | None = None, **options: Any
):
    defaults: dict[str, Any] = dict(
        output_dir=tempfile.mkdtemp(), max_steps=3, learning_rate=8e-4, per_device_train_batch_size=4,
        num_generations=4, max_completion_length=9, logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True, use_cpu=True, bf16=False, seed=3, num_iterations=2, gradient_checkpointing=False,
        temperature=0.9, max_grad_norm=1.0, dataloader_pin_memory=False,
    )  # fmt: skip
    if options.get("beta") and peft is None:  # the reference model is loaded again
        model.config._name_or_path = tempfile.mkdtemp()
        model.save_pretrained(model.config._name_or_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = trainer(
            model=model, reward_funcs=reward, args=config(**{**defaults, **options}), train_dataset=prompts(),
            eval_dataset=prompts().select(range(1)), processing_class=tokenizer(), peft_config=peft, **(ours or {}),
        )  # fmt: skip
    return made


def train(trainer: Any, inputs: Any = None) -> list[float]:
    """Every micro-batch's loss. `inputs` may change what the loss gets."""
    losses: list[float] = []
    loss = trainer._compute_loss

    def recorded(model: Any, given: dict[str, Any]) -> torch.Tensor:
        result = loss(model, inputs(given) if inputs else given)
        losses.append(result.item())
        return result

    trainer._compute_loss = recorded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return losses


TIMES = ("time", "runtime", "per_second", "epoch")


def metrics(trainer: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if not any(t in k for t in TIMES)} for entry in trainer.state.log_history]

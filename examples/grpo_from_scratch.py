"""GRPO from scratch: sample, reward, normalise, update. One process, or several with DDP:

    python examples/grpo_from_scratch.py
    torchrun --nproc-per-node 2 examples/grpo_from_scratch.py

A tiny Llama learns to answer any prompt with even tokens. `--model NAME` trains a model of the Hub instead.
"""

import argparse

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from grpo_kernels import LossConfig, group_advantages, linear_grpo_loss
from grpo_kernels.integrations.forward import check_synchronised, in_forward

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a causal language model of the Hub, or a folder; default: a tiny Llama")
parser.add_argument("--steps", type=int, default=15)
parser.add_argument("--prompts", type=int, default=4, help="per process and step")
parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
parser.add_argument("--length", type=int, default=8, help="tokens of a completion")
parser.add_argument("--updates", type=int, default=2, help="optimizer steps on each batch")
parser.add_argument("--temperature", type=float, default=1.0)
parser.add_argument("--lr", type=float, default=1e-2)
TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def loss_of(model, ids, mask, prompt, advantages, old_logps, denominator, scale, config, temperature):
    """Runs inside the wrapped model's forward, where DDP and FSDP see it; the logits are never materialised."""
    hidden = model.model(ids, attention_mask=mask).last_hidden_state[:, prompt - 1 :]  # one position more than targets
    return linear_grpo_loss(
        hidden, model.lm_head.weight, ids[:, prompt:], advantages, mask[:, prompt:], old_logps=old_logps,
        denominator=denominator, scale=scale, config=config, temperature=temperature,
    )  # fmt: skip


def main(args):
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    torch.manual_seed(0)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    else:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).to(device)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    config = LossConfig.preset("trl_dapo", eps_high=0.28)
    torch.manual_seed(1 + rank)  # every rank has prompts of its own
    history = []
    for step in range(args.steps):
        prompts = torch.randint(3, model.config.vocab_size, (args.prompts, 4), device=device)
        prompts = prompts.repeat_interleave(args.group, dim=0)
        with torch.no_grad():  # the sampler; in earnest, vLLM or SGLang
            ids = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, pad_token_id=0,
                eos_token_id=None, temperature=args.temperature, min_new_tokens=args.length, max_new_tokens=args.length,
            )  # fmt: skip
        mask, completions = torch.ones_like(ids), ids[:, prompts.shape[1] :]
        rewards = (completions % 2 == 0).float().mean(-1)
        advantages = group_advantages(rewards, group_size=args.group).advantages
        tokens = mask[:, prompts.shape[1] :].sum().float()  # of all ranks: DDP takes the gradients' mean
        if ranks > 1:
            dist.all_reduce(tokens)
        old_logps = None  # of the first update: the current policy
        for _ in range(args.updates):
            out = in_forward(
                wrapped, model, loss_of, ids, mask, prompts.shape[1], advantages, old_logps, tokens, ranks, config,
                args.temperature,
            )  # fmt: skip
            out.loss.backward()
            if step == 0:
                check_synchronised(model)  # raises if something has bypassed DDP
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            old_logps = out.logps if old_logps is None else old_logps
        log = torch.stack([rewards.mean(), out.metrics["approx_kl_k3"], out.metrics["clip_region"]])
        if ranks > 1:
            dist.all_reduce(log)
        reward, kl, clipped = (log / ranks).tolist()  # the step's one wait for the device
        history.append(reward)
        if rank == 0:
            print(f"step {step:3d}  reward {reward:.3f}  kl {kl:.4f}  clipped {clipped:.3f}")
    return history


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main(parser.parse_args())
    if dist.is_initialized():
        dist.destroy_process_group()

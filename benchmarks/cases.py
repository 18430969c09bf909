"""The cases of `pytest benchmarks --full`, by family: larger on a GPU, tiny in the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.tools.bench.case import Case, of_model
from grpo_kernels.tools.providers import LOSSES, Task

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
GRID = (4, 1024) if ON_GPU else (4, 128)
MODELS = ("qwen2.5-0.5b", "llama3.2-1b", "gemma3-1b", "gpt-oss-20b") if ON_GPU else ("qwen2.5-0.5b", "smollm2-135m")
HEAD = "qwen3-8b" if ON_GPU else "smollm2-135m"  # the model whose lm_head the linear path multiplies with
TOKEN_GRID = (512, 4096) if ON_GPU else (64, 1024)
REWARDS = 16384
GROUP_SIZES = (16, 128, 1024, 4096)
KL, ENTROPY = 0.04, 0.01
VOCAB = 150_000  # the vocabulary of diversity's completions


def shrunk(case: Case) -> Case:
    """The same computation on tiny inputs."""
    small = replace(case, model="", sequences=4, tokens=9)
    if case.task.path == "advantages":
        return replace(small, sequences=64, tokens=1, group_size=min(case.group_size, 16))
    return replace(small, vocab=1009 if case.vocab else 0, hidden=32 if case.hidden else 0)


def _variants(case: Case) -> list[Case]:
    """One thing changed at a time: masks, groups without advantage, terms, what is timed, every loss."""
    task = case.task
    changes: list[dict[str, Any]] = [
        {"fill": 0.6}, {"fill": 0.3}, {"silent": 0.4}, {"mode": "forward"}, {"mode": "backward"}, {"mode": "no_grad"},
        {"upstream": 0.5}, {"task": replace(task, kl_coef=KL)}, {"task": replace(task, entropy_coef=ENTROPY)},
    ]  # fmt: skip
    losses = [{"task": replace(task, loss=loss)} for loss in LOSSES if loss not in ("dapo", "bnpo")]
    return [replace(case, **change) for change in changes + losses]


def from_logits() -> list[Case]:
    task = Task("logits")
    plain = [of_model(model, task, *GRID, dtype=dtype) for model in MODELS for dtype in ("bf16", "fp32")]
    both = replace(plain[0], task=replace(task, kl_coef=KL, entropy_coef=ENTROPY))
    return [*plain, replace(plain[0], peaked=True), both, *_variants(plain[0])]


def from_hidden() -> list[Case]:
    case = of_model(HEAD, Task("linear"), *GRID)
    return [case, *([] if ON_GPU else [replace(case, dtype="fp32")]), *_variants(case)]


def log_probs() -> list[Case]:
    cases = [of_model(MODELS[0], Task("logps"), *GRID, dtype=dtype, mode="no_grad") for dtype in ("bf16", "fp32")]
    first = cases[0]
    return [
        *cases, replace(first, task=replace(first.task, entropy_coef=ENTROPY)), replace(first, fill=0.3),
        replace(first, mode="both"),
    ]  # fmt: skip


def from_log_probs() -> list[Case]:
    tasks = [Task("tokens", loss) for loss in LOSSES] + [Task("tokens", kl_coef=KL)]
    return [Case(task, "", *TOKEN_GRID, dtype="fp32") for task in tasks]


def advantages() -> list[Case]:
    groups = Case(Task("advantages"), sequences=REWARDS, dtype="fp32", mode="no_grad")
    gae = Case(Task("gae"), sequences=512, tokens=4096, dtype="fp32", mode="no_grad")
    return [*(replace(groups, group_size=size) for size in GROUP_SIZES), gae]


def completions(data: str, count: int, tokens: int) -> Tensor:
    """random: tokens drawn uniformly. zipf: distributed like words, so that all pairs have many in common. near: 1/8 of
    the completions are new; the others differ from one of them in a few percent of their tokens, on both sides of the
    threshold."""
    g = torch.Generator().manual_seed(0)
    if data == "zipf":
        cumulative = (1 / torch.arange(1, VOCAB + 1).double()).cumsum(0)
        draws = torch.rand(count, tokens, dtype=torch.float64, generator=g) * cumulative[-1]
        return torch.searchsorted(cumulative, draws).clamp(max=VOCAB - 1)
    ids = torch.randint(0, VOCAB, (count, tokens), generator=g)
    if data == "near":
        originals = ids[torch.arange(count) // 8 * 8]
        rate = torch.tensor([0.02, 0.04, 0.06, 0.08]).repeat(count // 4)[:, None]
        ids = torch.where(torch.rand(count, tokens, generator=g) < rate, ids, originals)
    return ids

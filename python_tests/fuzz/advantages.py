"""group_advantages and gae once more: a loop over groups, a loop over tokens, and exact sums; random calls of both."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import grpo_kernels as gk
from grpo_kernels.inputs.grouping import BASELINES, SCALES, SINGLES

ROUNDING = {np.float32: 4 * 1.2e-7, np.float64: 64 * 2.3e-16}  # of each summand, in the type that a backend adds in


def rounding_of(backend: str) -> float:
    return ROUNDING[np.float64 if backend in ("cpu", "reference") else np.float32]


# ---- groups ----


def mean(x: list[float]) -> float:
    return math.fsum(x) / len(x) if x else 0.0


def deviation(x: list[float], ddof: int) -> float:
    """0 for equal values and for too few of them."""
    if len(x) <= ddof or len(set(x)) < 2:
        return 0.0
    middle = mean(x)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in x) / (len(x) - ddof))


def baseline_of(i: int, group: list[int], r: list[float], call: dict[str, Any]) -> float:
    others = [r[j] for j in group if j != i]
    if call["baseline"] == "none":
        return 0.0
    if call["baseline"] == "leave_one_out":
        return mean(others)
    lengths = [call["lengths"][j] for j in group] if call["baseline"] == "length_weighted" else []
    if sum(lengths) > 0:
        return math.fsum(n * r[j] for n, j in zip(lengths, group, strict=True)) / sum(lengths)
    return mean([r[j] for j in group])


def advantage_of(
    i: int, group: list[int], batch: list[int], r: list[float], call: dict[str, Any]
) -> tuple[float, float]:
    """The advantage of a valid sample, and what its rounding errors are relative to."""
    rewards = [r[j] for j in group]
    constant = len(set(rewards)) == 1
    if len(group) == 1:
        a = r[i] if call["single"] == "raw" else 0.0
    elif constant and call["baseline"] != "none":
        a = 0.0
    else:
        a = r[i] - baseline_of(i, group, r, call)
    value, w = call["critic"][i], call["critic_weight"]
    blended = not math.isnan(value)
    if blended:
        a = (1 - w) * a + w * (r[i] - value)
    if len(group) == 1 and not blended:
        return a, abs(a)
    size = max(map(abs, rewards)) + (abs(value) if blended else 0.0)
    if call["scale"] == "none":
        return a, size
    if call["scale"] == "mean":
        middle = mean(rewards)
        return (a / middle, size * (1 + max(map(abs, rewards)) / middle) / middle) if middle > 0 else (0.0, 0.0)
    among = {"group": group, "batch": batch, "leave_one_out": [j for j in group if j != i]}[call["scale"]]
    std = deviation([r[j] for j in among], call["ddof"])
    if std == 0:
        return a, size
    return a / (std + call["eps"]), size / (std + call["eps"]) * (1 + max(abs(r[j]) for j in among) / std)


@st.composite
def group_calls(draw: Any) -> dict[str, Any]:
    pick = lambda values: draw(st.sampled_from(values))  # noqa: E731
    scale, baseline, critic = pick(SCALES), pick(BASELINES), draw(st.booleans())
    return {
        "samples": draw(st.integers(0, 24)), "components": pick([None, None, 1, 3]), "consecutive": draw(st.booleans()),
        "kind": pick(["normal", "binary", "constant", "offset", "tiny", "magnitudes"]), "missing": pick([0.0, 0.2, 1.0]),
        "invalid": pick([None, 0.3]), "baseline": baseline, "scale": scale, "ddof": pick([0, 1]),
        "eps": 1e-4 if scale in ("mean", "none") else pick([0.0, 1e-6, 1e-4]), "single": pick(SINGLES),
        "clip": pick([None, None, 0.8, (-0.5, None)]), "critic_weight": pick([0.3, 1.0]) if critic else 0.0,
        "dtype": pick(["float32", "float64", "bfloat16"]), "seed": draw(st.integers(0, 2**32 - 1)),
    }  # fmt: skip


def rewards_of(call: dict[str, Any], rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.standard_normal(shape)
    return {
        "normal": x, "binary": (x > 0) * 1.0, "constant": 0 * x + 0.1, "offset": x + 1e4, "tiny": 1e-6 * x,
        "magnitudes": x * 10.0 ** rng.integers(-3, 4, shape),
    }[call["kind"]]  # fmt: skip


def check_group(call: dict[str, Any], backend: str) -> None:
    """One drawn call of group_advantages."""
    rng, n = np.random.default_rng(call["seed"]), call["samples"]
    dtype = getattr(torch, call["dtype"])
    shape = (n,) if call["components"] is None else (n, call["components"])
    given = rewards_of(call, rng, shape)
    given[rng.random(shape) < call["missing"]] = np.nan
    rewards = torch.tensor(given).reshape(shape).to(dtype)
    arguments: dict[str, Any] = {name: call[name] for name in ("baseline", "scale", "ddof", "eps", "single", "clip")}
    weights = rng.random(call["components"] or 1).tolist()
    if call["components"] is not None and call["ddof"]:
        arguments["reward_weights"] = weights
    else:
        weights = [1.0] * len(weights)
    valid = np.ones(n, bool) if call["invalid"] is None else rng.random(n) >= call["invalid"]
    if call["invalid"] is not None:
        arguments["valid"] = torch.tensor(valid)
    size = next(k for k in (4, 3, 2, 1) if n % k == 0)
    ids = np.arange(n) // size if call["consecutive"] else rng.integers(-2, 3, n) * 1_000_003
    arguments |= {"group_size": size} if call["consecutive"] else {"group_ids": torch.tensor(ids).reshape(n)}
    call = {**call, "lengths": rng.integers(0, 9, n) * (call["seed"] % 4 != 0), "critic": np.full(n, np.nan)}
    if call["baseline"] == "length_weighted":
        arguments["lengths"] = torch.tensor(call["lengths"]).reshape(n)
    if call["critic_weight"]:
        call["critic"] = np.where(rng.random(n) < 0.8, rng.standard_normal(n), np.nan)
        arguments |= {"critic_values": torch.tensor(call["critic"]).reshape(n), "critic_weight": call["critic_weight"]}
    out = gk.group_advantages(rewards, backend=backend, **arguments)

    parts = rewards.double().reshape(n, call["components"] or 1).numpy()
    r = [math.fsum(w * x for w, x in zip(weights, row, strict=True) if not math.isnan(x)) for row in parts.tolist()]
    here = [i for i in range(n) if valid[i] and not np.isnan(parts[i]).all()]
    eps = float(torch.finfo(out.advantages.dtype).eps)
    low, high = call["clip"] if isinstance(call["clip"], tuple) else (-(call["clip"] or math.inf), call["clip"])
    for i in range(n):
        group = [j for j in here if ids[j] == ids[i]]
        exact, size_of = advantage_of(i, group, here, r, call) if i in here else (0.0, 0.0)
        exact = min(max(exact, low), math.inf if high is None else high)
        got = float(out.advantages[i])
        assert abs(got - exact) <= eps * abs(exact) + rounding_of(backend) * size_of, (
            f"advantage {i}: {got!r}, not {exact!r}"
        )
        middle = mean([r[j] for j in group])
        limit = eps * abs(middle) + rounding_of(backend) * max([abs(r[j]) for j in group], default=0)
        assert abs(float(out.mean[i]) - middle) <= limit, f"mean {i}: {float(out.mean[i])!r}, not {middle!r}"
        disagrees = any(not math.isnan(call["critic"][j]) and r[j] != call["critic"][j] for j in group)
        assert bool(out.informative[i]) == (len({r[j] for j in group}) > 1 or disagrees), f"informative {i}"


# ---- returns ----


@st.composite
def return_calls(draw: Any, longest: int = 40) -> dict[str, Any]:
    pick = lambda values: draw(st.sampled_from(values))  # noqa: E731
    return {
        "packed": draw(st.booleans()), "batch": draw(st.integers(0, 5)), "tokens": draw(st.integers(0, longest)),
        "mask": pick([None, 0.0, 0.5, 0.9]), "outcome": draw(st.booleans()), "gamma": pick([0.0, 0.5, 0.99, 1.0]),
        "lam": pick([0.0, 0.5, 0.95, 1.0]), "dtype": pick(["float32", "float64"]), "seed": draw(st.integers(0, 2**32 - 1)),
    }  # fmt: skip


def check_gae(call: dict[str, Any], backend: str) -> None:
    """One drawn call of gae, masked tokens poisoned."""
    rng, batch = np.random.default_rng(call["seed"]), call["batch"]
    lengths = rng.integers(0, call["tokens"] + 1, batch) if call["packed"] else np.full(batch, call["tokens"])
    n = int(lengths.sum()) + (2 if call["packed"] else 0)
    dtype = getattr(torch, call["dtype"])
    on = np.ones(n, bool) if call["mask"] is None else rng.random(n) < call["mask"]
    values, rewards = (rng.standard_normal(n).astype(np.float32).astype(np.float64) for _ in range(2))
    shape = (n,) if call["packed"] else (batch, call["tokens"])

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.where(on, x, np.nan)).to(dtype).reshape(shape)

    bounds = np.concatenate([[0], np.cumsum(lengths)])
    arguments: dict[str, Any] = {} if call["mask"] is None else {"mask": torch.tensor(on).reshape(shape)}
    if call["packed"]:
        arguments["cu_seqlens"] = torch.tensor(bounds)
    given = tensor(rewards)
    ambiguous = not call["packed"] and shape == (batch,)
    if call["outcome"] and not ambiguous and shape != (batch,):
        outcome = rng.standard_normal(batch).astype(np.float32).astype(np.float64)
        given, rewards = torch.tensor(outcome).to(dtype), np.zeros(n)
        for i in range(batch):
            active = [t for t in range(bounds[i], bounds[i + 1]) if on[t]]
            if active:
                rewards[active[-1]] = outcome[i]
    out = gk.gae(given, tensor(values), gamma=call["gamma"], lam=call["lam"], backend=backend, **arguments)
    exact, size = np.zeros(n), np.zeros(n)
    for i in range(batch):
        after, after_size, value, value_size = 0.0, 0.0, 0.0, 0.0
        for t in reversed(range(bounds[i], bounds[i + 1])):
            if not on[t]:
                continue
            after = rewards[t] + call["gamma"] * value - values[t] + call["gamma"] * call["lam"] * after
            after_size = abs(rewards[t]) + value_size + abs(values[t]) + call["gamma"] * call["lam"] * after_size
            value, value_size = values[t], abs(values[t])
            exact[t], size[t] = after, after_size
    in_sequence = on & (np.arange(n) < bounds[-1])
    eps = float(torch.finfo(out.advantages.dtype).eps)
    for name, got, true in (
        ("advantages", out.advantages, exact),
        ("returns", out.returns, np.where(in_sequence, exact + values, 0)),
    ):
        mine = got.double().reshape(-1).numpy()
        wrong = ~(abs(mine - true) <= eps * abs(true) + rounding_of(backend) * (size + 1))
        assert not wrong.any(), f"{name} {np.flatnonzero(wrong)[:4]}: {mine[wrong][:4]}, not {true[wrong][:4]}"
        assert not mine[~in_sequence].any(), f"{name}: a masked token has one"

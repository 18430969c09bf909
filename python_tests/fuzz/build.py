"""Tensors of a drawn call: for the library as the call lays them out, for the oracle as flat arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import grpo_kernels as gk

from . import oracle, vocabulary
from .calls import Call

LOWEST = {torch.float32: -3.4e38, torch.bfloat16: -3.38e38, torch.float16: -65504.0, torch.float64: -1.7e308}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Built(NamedTuple):
    """A call's tensors for the library, and the same for the oracle."""

    config: gk.LossConfig
    arguments: dict[str, Any]  # of the library's function but for logits (or log-probs, and entropy)
    logits: Tensor | None  # as laid out
    logps: Tensor | None
    entropy: Tensor | None
    head: tuple[Tensor, Tensor | None] | None  # weight and bias of the linear path, whose logits are the hidden states
    upstream: tuple[Tensor, Tensor] | None  # of log-probs and entropies, for token_logps
    tokens: oracle.Tokens
    rows: dict[type, vocabulary.Rows]  # by the type they were computed in
    targets: np.ndarray  # [N]
    shape: tuple[int, ...]  # of the tokens


def build(call: Call) -> Built:
    return _Builder(call).build()


class _Builder:
    def __init__(self, call: Call) -> None:
        self.call, self.rng = call, np.random.default_rng(call.seed)
        self.dtype = DTYPES[call.dtype]
        self.acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.config = gk.LossConfig(**call.config)
        self.packed = call.form in ("packed", "flat")
        self.batch, self.width, self.n = call.batch, call.tokens, call.batch * call.tokens
        self.lengths = np.full(self.batch, self.width)
        if call.form == "packed" and self.batch:  # ragged, and two tokens behind the last boundary now and then
            self.lengths = self.rng.integers(0, self.width + 1, self.batch)
            self.n = int(self.lengths.sum()) + int(self.rng.integers(0, 3))
        self.shape = (self.n,) if self.packed else (self.batch, self.width)
        self.sequence = np.repeat(np.arange(self.batch), self.lengths)
        self.tail = self.n - len(self.sequence)
        self.sequence = np.concatenate([self.sequence, np.zeros(self.tail, int)])
        self.sequences = self.batch
        if call.form == "flat":
            self.sequence, self.sequences = np.zeros(self.n, int), 1

    # ---- numbers ----

    def rounded(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return x.astype(np.float32).astype(np.float64)

    def active(self) -> np.ndarray:
        kind, rng = self.call.mask, self.rng
        position = np.concatenate([np.arange(k) for k in self.lengths] or [np.zeros(0, int)])
        position = np.concatenate([position, np.zeros(self.tail, int)]).astype(int)
        ends = rng.integers(0, self.width + 1, max(self.batch, 1))
        sequence = np.repeat(np.arange(self.batch), self.lengths)
        sequence = np.concatenate([sequence, np.zeros(self.tail, int)]).astype(int)
        on = {
            "none": np.ones(self.n, bool), "ragged": position < ends[sequence] if self.n else np.ones(0, bool),
            "holes": position % 3 != 1, "random": rng.random(self.n) < 0.6, "empty": np.zeros(self.n, bool),
            "one": np.arange(self.n) == self.n // 2,
        }[kind]  # fmt: skip
        self.masked = on.copy()
        if self.tail and self.call.form == "packed" and self.call.entry != "logps":
            on[-self.tail :] = False
        return on

    def logits(self) -> np.ndarray:
        rng, v = self.rng, self.call.vocab
        kinds = self.call.logits
        count = self.width if self.call.layout == "expanded" and not self.packed and self.batch else self.n
        out = np.zeros((count, v))
        for i in range(count):
            kind, z = kinds[i % len(kinds)], 2 * rng.standard_normal(v)
            z = {"wide": 50 * z, "offset": z + 1e4, "tiny": 1e-6 * z, "negative": z - 1e4, "equal": 0 * z + 0.3}.get(
                kind, z
            )
            if kind == "peaked":
                z[rng.integers(v)] += 25
            if kind in ("minus_inf", "lowest", "all_lowest"):
                off = rng.random(v) < (0.7 if kind != "all_lowest" else 2)
                if kind != "all_lowest":
                    off[rng.integers(v)] = False
                z[off] = -np.inf if kind == "minus_inf" else LOWEST[self.dtype]
            out[i] = z
        x = torch.tensor(out).to(self.dtype).double().numpy()
        if count < self.n:
            x = np.tile(x, (self.batch, 1))
        return x.reshape(self.n, v)

    def chosen(self, logits: np.ndarray) -> np.ndarray:
        """Targets with a probability above 0."""
        if not self.n:
            return np.zeros(0, np.int64)
        there = np.isfinite(logits) & (logits > -1e30) if logits.min() < -1e30 else np.ones(logits.shape, bool)
        if self.call.extreme == "zero_target":
            rows = np.isneginf(logits).any(1) & (self.rng.random(self.n) < 0.3)
            there[rows] = np.isneginf(logits[rows])
        there[~there.any(1)] = True
        random = np.where(there, self.rng.random(logits.shape), -1).argmax(1)
        return {
            "random": random, "likeliest": np.where(there, logits, -np.inf).argmax(1),
            "unlikeliest": np.where(there, logits, np.inf).argmin(1),
        }[self.call.targets]  # fmt: skip

    def near(self, lp: np.ndarray, extreme: bool) -> np.ndarray:
        """Log-probs of another policy."""
        noise = self.rng.standard_normal(self.n) * self.call.distance
        x = self.rounded(np.minimum(lp + noise, 0.0))
        far = {"far": -self.rng.choice([200.0, 2000.0], self.n), "minus_inf": -np.inf, "nan": np.nan}
        if extreme and self.call.extreme in far:
            x = np.where(self.rng.random(self.n) < 0.3, far[self.call.extreme], x)
        return x

    def shared(self, values: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Per token, or now and then one a sequence, [R] or [B, 1]."""
        if self.call.form == "flat" or self.rng.random() < 0.7 or not self.sequences or self.n == self.sequences:
            return values, self.tensor(self.poisoned(values))
        values = np.resize(values, self.sequences) if self.n else np.ones(self.sequences)
        tensor = torch.tensor(values).to(self.acc)
        return values[self.sequence], tensor[:, None] if not self.packed and self.rng.random() < 0.5 else tensor

    def advantages(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Per token, and how they are given."""
        kind, rng = self.call.advantages, self.rng
        signs = rng.integers(-1, 2, max(self.sequences, 1))
        values = self.rounded(signs * np.exp(rng.standard_normal(max(self.sequences, 1))))
        padded = not self.packed
        if kind.endswith("rewards") and padded and self.call.entry == "grpo" and self.batch:
            size = self.batch // 2 if self.batch % 2 == 0 else self.batch
            rewards = self.rounded(rng.choice([0.0, 1.0, 0.25, 3.5], self.batch))
            adv = np.zeros(self.batch)
            for g in range(0, self.batch, size):
                r = rewards[g : g + size]
                adv[g : g + size] = r - r.mean()
                if (r == r[0]).all():
                    adv[g : g + size] = 0
                elif kind == "rewards":
                    adv[g : g + size] /= r.std(ddof=1) + 1e-4
            scale = "group" if kind == "rewards" else "none"
            given = {"rewards": torch.tensor(rewards).to(self.acc), "group_size": size, "advantage_scale": scale}
            return adv[self.sequence], given
        if kind == "sequence" and self.call.form != "flat":
            tensor = torch.tensor(values[: self.sequences]).to(self.acc)
            return (values[self.sequence] if self.sequences else np.zeros(self.n)), {"advantages": tensor}
        each = self.rounded(rng.standard_normal(self.n) * (rng.random(self.n) < 0.8) * (kind != "zeros"))
        return each, {"advantages": self.tensor(each)}

    # ---- tensors ----

    def tensor(self, x: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """Per token, in the caller's shape."""
        return torch.tensor(x).to(dtype or self.acc).reshape(self.shape)

    def poisoned(self, x: np.ndarray) -> np.ndarray:
        if not self.call.poison:
            return x
        junk = np.array([np.nan, np.inf, -np.inf])[np.arange(len(x)) % 3]
        return np.where(self.on if x.ndim == 1 else self.on[:, None], x, junk if x.ndim == 1 else junk[:, None])

    def laid_out(self, logits: np.ndarray) -> Tensor:
        v, extra = self.call.vocab, int(self.call.form == "extra")
        if self.packed:
            x = torch.tensor(self.poisoned(logits)).to(self.dtype)
        elif self.call.layout == "expanded" and self.batch:
            x = torch.tensor(logits).to(self.dtype).reshape(self.batch, self.width, v)[:1]
        else:
            x = torch.tensor(self.poisoned(logits)).to(self.dtype).reshape(self.batch, self.width, v)
        if extra:
            x = torch.cat([x, torch.full((x.shape[0], 1, v), float("nan"), dtype=self.dtype)], 1)
        layout = self.call.layout
        if layout == "expanded" and not self.packed and self.batch:
            return x.expand(self.batch, -1, -1)
        if layout == "padded_rows":
            room = torch.full((*x.shape[:-1], v + 3), float("nan"), dtype=self.dtype)
            room[..., :v] = x
            return room[..., :v]
        if layout == "transposed" and not self.packed:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "offset":
            room = torch.full((x.numel() + 3,), float("nan"), dtype=self.dtype)
            room[3:] = x.flatten()
            return room[3:].view(x.shape)
        return x

    def temperature(self) -> tuple[np.ndarray, float | Tensor]:
        kind = self.call.transform["temperature"]
        if not isinstance(kind, str):
            return np.full(self.n, kind), kind
        if kind == "row" and not self.packed and self.batch:
            t = self.rounded(0.5 + self.rng.random(self.batch))
            return t[self.sequence], torch.tensor(t).to(self.acc)
        t = self.rounded(0.5 + self.rng.random(self.n))
        return t, self.tensor(self.poisoned(t) if self.call.poison else t)

    def from_hidden(self) -> tuple[np.ndarray, np.ndarray, Tensor, tuple[Tensor, Tensor | None]]:
        """Logits, what their rounding errors are relative to, hidden states, and the head."""
        wide = np.longdouble if self.dtype == torch.float64 else np.float64
        hidden, weight = (self.rounded(self.rng.standard_normal((k, 4))) for k in (self.n, self.call.vocab))
        bias = self.rounded(self.rng.standard_normal(self.call.vocab)) if self.call.single_pass else None
        logits, size = hidden.astype(wide) @ weight.astype(wide).T, abs(hidden) @ abs(weight).T
        if bias is not None:
            logits, size = logits + bias, size + abs(bias)
        as_tensor = lambda x: None if x is None else torch.tensor(x).to(self.dtype)  # noqa: E731
        x = torch.tensor(self.poisoned(hidden)).to(self.dtype).reshape(*self.shape, 4)
        if self.call.form == "extra":
            x = torch.cat([x, torch.full((self.batch, 1, 4), float("nan"), dtype=self.dtype)], 1)
        return logits, size, x, (as_tensor(weight), as_tensor(bias))

    def build(self) -> Built:
        call, rng = self.call, self.rng
        self.on = on = self.active()
        arguments: dict[str, Any] = {}
        layout = upstream = logps = entropy = head = None
        rows: dict[type, vocabulary.Rows] = {}
        targets = np.zeros(self.n, np.int64)
        by_target = call.poison and call.mask_dtype == "bool" and call.entry != "policy"  # ignore_index masks, alone
        if call.entry == "policy":
            lp = self.rounded(-np.exp(2 * rng.standard_normal(self.n)))
            h = self.rounded(np.exp(rng.standard_normal(self.n)))
            if call.extreme == "zero_target":
                lp = np.where(rng.random(self.n) < 0.3, -np.inf, lp)
            logps, entropy = self.tensor(self.poisoned(lp)), self.tensor(self.poisoned(h))
        else:
            size: np.ndarray | float = 0.0
            if call.entry == "linear":
                logits, size, layout, head = self.from_hidden()
            else:
                logits = self.logits()
                layout = self.laid_out(logits)
            targets = self.chosen(logits)
            t, temperature = self.temperature()
            transform = {**call.transform, "temperature": temperature}
            reals = (np.float64, np.float32) if self.acc == torch.float32 else (np.longdouble, np.float64)
            rows = {
                real: vocabulary.rows(
                    logits, size, targets, on, t, transform["logit_scale"], transform["softcap"], real
                )
                for real in reals
            }
            arguments |= transform
            lp = rows[reals[0]].logp.astype(np.float64)
            ignored = np.where(self.masked, targets, -100 if by_target else -7)
            arguments["targets"] = self.tensor(ignored if call.poison else targets, torch.int64)
        if call.mask != "none" and not by_target:
            arguments["mask"] = self.tensor(2 * self.masked.astype(np.int64), getattr(torch, call.mask_dtype))
        if call.entry == "logps":
            upstream = tuple(self.tensor(self.rounded(rng.standard_normal(self.n))) for _ in range(2))
            tokens = oracle.Tokens(on, self.sequence, self.sequences, np.zeros(self.n))
        else:
            tokens = self.policy_arguments(lp, arguments)
        return Built(self.config, arguments, layout, logps, entropy, head, upstream, tokens, rows, targets, self.shape)

    def policy_arguments(self, lp: np.ndarray, arguments: dict[str, Any]) -> oracle.Tokens:
        call, rng, c = self.call, self.rng, self.config
        adv, given = self.advantages()
        if "advantages" in given and given["advantages"].shape == self.shape and given["advantages"].numel() == self.n:
            given["advantages"] = self.tensor(self.poisoned(adv))
        arguments |= given
        found: dict[str, Any] = {}
        lp = np.where(np.isfinite(lp), lp, -5.0)
        names = {"old": "old_logps", "ref": "ref_logps", "rollout": "rollout_logps"}
        for name in sorted(call.given):
            if name in names:
                found[name] = self.near(lp, extreme=name != "ref")
                arguments[names[name]] = self.tensor(self.poisoned(found[name]))
            elif name == "entropy_mask":
                fraction = 0.5 if c.objective != "gmpo" and rng.random() < 0.2 else 1.0
                found[name], arguments[name] = self.shared((rng.random(self.n) < 0.6) * fraction)
            elif name == "token_weights":
                weights = self.rounded(np.exp(rng.standard_normal(self.n)) * (rng.random(self.n) < 0.8))
                found[name], arguments[name] = self.shared(weights)
                if c.objective == "vespo" and arguments[name].shape != self.shape:  # counts once in a sum over tokens
                    active = np.flatnonzero(self.on)
                    first = active[np.unique(self.sequence[active], return_index=True)[1]]
                    found[name] = np.where(np.isin(np.arange(self.n), first), found[name], 1.0)
            else:
                found[name] = self.rounded(
                    np.exp(rng.standard_normal(self.sequences)) * (rng.random(self.sequences) < 0.8)
                )
                arguments[name] = torch.tensor(found[name]).to(self.acc)
        if call.form == "packed":
            arguments["cu_seqlens"] = torch.tensor(np.concatenate([[0], np.cumsum(self.lengths)])).to(torch.int32)
        if call.denominator is not None:
            arguments["denominator"] = call.denominator if rng.random() < 0.5 else torch.tensor(call.denominator)
        arguments["scale"] = call.scale if rng.random() < 0.5 else torch.tensor(call.scale)
        random_order = None
        if c.objective == "clip_cov":
            torch.manual_seed(call.seed % 1000)
            random_order = torch.rand(self.shape if not self.packed else (1, self.n)).double().numpy().reshape(-1)
        return oracle.Tokens(
            self.on, self.sequence, self.sequences, adv, denominator=call.denominator, scale=call.scale,
            kl_coef=float(c.kl_coef), entropy_coef=float(c.entropy_coef), has_kl=c.has_kl, has_entropy=c.has_entropy,
            random_order=random_order, **found,
        )  # fmt: skip

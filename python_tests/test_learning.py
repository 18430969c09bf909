"""Learning curves: a tiny policy trained with our loss ends where the plain formula in eager PyTorch takes it.

The policy writes four tokens after a prompt of one, from an embedding of both and a head; the reward is the share of
tokens that equal the prompt's. Each rollout is used for two optimizer steps, so the ratio leaves 1, with a KL to the
initial policy and an entropy bonus. Compared is the end of each curve: the mean over its last fifth.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F
from oracle_cases import one_thread as one_thread

import grpo_kernels as gk

VOCAB, WIDTH, LENGTH, PROMPTS, GROUP = 12, 16, 4, 4, 8
EPS, KL, ENTROPY = 0.2, 0.02, 0.01
CONFIG = gk.LossConfig(eps_low=EPS, kl_coef=KL, entropy_coef=ENTROPY)
CURVES = ("reward", "kl", "entropy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Policy(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.token, self.prompt = torch.nn.Embedding(VOCAB + 1, WIDTH), torch.nn.Embedding(VOCAB, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCAB, bias=False)

    def hidden(self, prompts, tokens):
        """[B, LENGTH, WIDTH], of the tokens before each position."""
        before = F.pad(tokens[:, :-1], (1, 0), value=VOCAB)
        return torch.tanh(self.token(before) + self.prompt(prompts)[:, None])

    def sample(self, prompts, noise):
        tokens = torch.zeros(len(prompts), LENGTH, dtype=torch.int64)
        for t in range(LENGTH):  # by Gumbel noise, which is the same in all runs of a seed
            tokens[:, t] = (self.head(self.hidden(prompts, tokens)[:, t]) + noise[:, t]).argmax(-1)
        return tokens


def logps_and_entropy(logits, tokens):
    logp = F.log_softmax(logits.float(), -1)
    return logp.gather(-1, tokens[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def plain(hidden, weight, tokens, advantages, old, ref):
    """clip, k3 and entropy, a mean over tokens, from torch's own operators."""
    lp, entropy = logps_and_entropy(hidden @ weight.T, tokens)
    r, a, u = (lp - old).exp(), advantages[:, None], ref - lp
    policy = -torch.minimum(r * a, r.clamp(1 - EPS, 1 + EPS) * a)
    return (policy + KL * (u.exp() - u - 1) - ENTROPY * entropy).mean()


def from_logits(hidden, weight, tokens, advantages, old, ref):
    return gk.grpo_loss(
        hidden @ weight.T, tokens, advantages, old_logps=old, ref_logps=ref, config=CONFIG, backend="cpu"
    ).loss


def from_hidden(hidden, weight, tokens, advantages, old, ref):
    return gk.linear_grpo_loss(
        hidden, weight, tokens, advantages, old_logps=old, ref_logps=ref, config=CONFIG, backend="cpu"
    ).loss


def wrong_sign(hidden, weight, tokens, advantages, old, ref):
    return from_logits(hidden, weight, tokens, -advantages, old, ref)


def train(loss, dtype, seed, steps):
    """The end of each curve."""
    policy, reference = Policy(seed), Policy(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(seed)
    curves = {name: [] for name in CURVES}
    for _ in range(steps // 2):
        prompts = torch.randint(VOCAB, (PROMPTS,), generator=generator).repeat_interleave(GROUP)
        noise = -torch.empty(len(prompts), LENGTH, VOCAB).exponential_(generator=generator).log()
        with torch.no_grad():
            tokens = policy.sample(prompts, noise)
            old, entropy = logps_and_entropy(policy.head(policy.hidden(prompts, tokens)), tokens)
            ref, _ = logps_and_entropy(reference.head(reference.hidden(prompts, tokens)), tokens)
        rewards = (tokens == prompts[:, None]).float().mean(-1)
        grouped = rewards.view(PROMPTS, GROUP)
        centred = grouped - grouped.mean(-1, keepdim=True)
        advantages = (centred / (grouped.std(-1, keepdim=True) + 1e-4)).flatten()
        for name, x in zip(CURVES, (rewards, old - ref, entropy), strict=True):
            curves[name].append(float(x.mean()))
        for _ in range(2):
            hidden = policy.hidden(prompts, tokens).to(dtype)
            optimizer.zero_grad()
            loss(hidden, policy.head.weight.to(dtype), tokens, advantages, old, ref).backward()
            optimizer.step()
    last = max(len(curves["reward"]) // 5, 1)
    return {name: statistics.fmean(values[-last:]) for name, values in curves.items()}


def alike(ours, theirs):
    """The curves on which the mean of each lies within the other's least and largest seed."""

    def within(a, b, name):
        return min(x[name] for x in b) <= statistics.fmean(x[name] for x in a) <= max(x[name] for x in b)

    return [name for name in CURVES if within(ours, theirs, name) and within(theirs, ours, name)]


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES)
def test_300_steps_end_within_each_others_spread(dtype):
    runs = {
        loss.__name__: [train(loss, DTYPES[dtype], seed, 300) for seed in range(5)]
        for loss in (plain, from_logits, from_hidden, wrong_sign)
    }
    for name, ends in runs.items():
        spread = {c: [round(x[c], 4) for x in ends] for c in CURVES}
        print(dtype, name, {c: (round(statistics.fmean(v), 4), min(v), max(v)) for c, v in spread.items()})
    assert alike(runs["from_logits"], runs["plain"]) == [*CURVES]
    assert alike(runs["from_hidden"], runs["plain"]) == [*CURVES]
    assert not {"reward", "kl"} & {*alike(runs["wrong_sign"], runs["plain"])}


def test_a_few_steps_of_one_seed():
    """With one seed the measure is how far training has come: ours may end a tenth of that away."""
    start, end = train(plain, torch.float32, 0, 2), train(plain, torch.float32, 0, 60)

    def near(loss):
        ours = train(loss, torch.float32, 0, 60)
        return [c for c in CURVES if abs(ours[c] - end[c]) <= 0.1 * abs(end[c] - start[c])]

    assert near(from_logits) == near(from_hidden) == [*CURVES]
    assert "reward" not in near(wrong_sign) and "kl" not in near(wrong_sign)

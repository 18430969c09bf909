"""A captured loss follows what is written into its tensors, including the coefficients.

On a GPU this tests the graphs themselves. Without one it does what a graph does: it repeats the backend's calls with
the same arguments after their memory has been overwritten."""

import pytest
import torch
from conftest import BACKENDS_HERE

import grpo_kernels as gk
from grpo_kernels.backends import implementation
from grpo_kernels.testing.inputs import make_batch

GPU = torch.cuda.is_available()
VOCAB = 40


class Static:
    """Tensors with fixed addresses; `write` puts another batch and other coefficients into them."""

    def __init__(self, device, seed=0):
        b = make_batch(4, 5, VOCAB, seed=seed).to(torch.float32)
        self.batch = type(b)(*(x.to(device) for x in b))
        self.rewards = self.batch.advantages + 1
        self.kl, self.entropy = torch.tensor(0.1, device=device), torch.tensor(0.05, device=device)

    def write(self, seed, kl, entropy):
        other = Static(self.kl.device, seed)
        for mine, new in zip((*self.batch, self.rewards), (*other.batch, other.rewards), strict=True):
            mine.copy_(new)
        self.kl.fill_(kl), self.entropy.fill_(entropy)

    def config(self, **form):
        return gk.LossConfig(kl_coef=self.kl, entropy_coef=self.entropy, **form)


def grpo_loss(s, backend, form=None, **options):
    b, x = s.batch, s.batch.logits.detach().requires_grad_()
    scale = torch.ones((), device=x.device)
    if "rewards" not in options:
        options["advantages"] = b.advantages
    out = gk.grpo_loss(
        x * 1.0, b.targets, mask=b.mask, config=s.config(**(form or {})), scale=scale, backend=backend, **options,
        **b.keywords(),
    )  # fmt: skip
    return out.loss.detach(), out.metrics["kl_loss"], *torch.autograd.grad(out.loss, x)


def policy_loss(s, backend):
    b, x = s.batch, s.batch.old_logps.detach().requires_grad_()
    out = gk.policy_loss(
        x * 0.9, b.advantages, b.mask, entropy=b.entropy_mask, config=s.config(), backend=backend, **b.keywords()
    )
    return out.loss.detach(), out.metrics["kl_loss"], *torch.autograd.grad(out.loss, x)


def value_loss(s, backend):
    b, x = s.batch, s.batch.old_logps.detach().requires_grad_()
    out = gk.value_loss(x * 1.0, b.ref_logps, b.rollout_logps, b.mask, backend=backend)
    return out.loss.detach(), *torch.autograd.grad(out.loss, x)


STEPS = {
    "policy_loss": policy_loss,
    "grpo_loss": grpo_loss,
    "in place": lambda s, backend: grpo_loss(s, backend, inplace=True),
    "two sweeps": lambda s, backend: grpo_loss(s, backend, single_pass=False),
    "gspo": lambda s, backend: grpo_loss(s, backend, {"ratio_level": "sequence"}),
    "rewards": lambda s, backend: grpo_loss(s, backend, rewards=s.rewards, group_size=2),
    "value_loss": value_loss,
    "group_advantages": lambda s, backend: gk.group_advantages(s.rewards, group_size=2, backend=backend)[:1],
    "gae": lambda s, backend: gk.gae(
        s.batch.old_logps, s.batch.ref_logps, s.batch.mask, gamma=0.99, lam=0.95, backend=backend
    )[:2],
}


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", STEPS)
def test_a_captured_graph_follows(name, backend):
    if backend not in BACKENDS_HERE:
        pytest.skip(f"needs {backend}")
    static, step = Static("cuda"), STEPS[name]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are loaded and compiled by their first launches
        for _ in range(2):
            step(static, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(static, backend)
    for seed, kl, entropy in ((0, 0.1, 0.05), (1, 0.9, 0.0), (2, 0.0, 0.3)):
        static.write(seed, kl, entropy)
        graph.replay()
        for result, expected in zip(results, step(static, backend), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.skipif(GPU, reason="the graphs themselves are tested")
@pytest.mark.parametrize("name", ["policy_loss", "grpo_loss", "in place"])
@pytest.mark.parametrize("backend", [b for b in ("cpu", "emulated", "triton") if b in BACKENDS_HERE])
def test_repeated_calls_follow(name, backend, monkeypatch):
    """The calls are recorded once with their results, which the repetition overwrites, as a graph does."""
    static, step, module, calls = Static("cpu"), STEPS[name], implementation(backend), []

    def recorded(fn):
        def call(*args):
            calls.append((fn, args, fn(*args)))
            return calls[-1][2]

        return call

    with monkeypatch.context() as patch:
        for fn in ("row_policy", "token_policy"):
            patch.setattr(module, fn, recorded(getattr(module, fn)))
        before = [x.clone() for x in step(static, backend)]
    assert (
        [fn.__name__ for fn, _, _ in calls] == ["token_policy"]
        if name == "policy_loss"
        else ["row_policy", "token_policy"]
    )
    static.write(0, 0.9, 0.3)  # the same batch: what torch computed between the calls still holds
    for fn, args, returned in calls:
        if fn.__name__ == "row_policy":
            args[0].logits.copy_(static.batch.logits)
        for old, new in zip(returned, fn(*args), strict=True):
            old.copy_(new)
    loss, kl_loss, *_ = step(static, backend)
    again = calls[-1][2]
    assert torch.equal(again[0], loss) and not torch.equal(before[0], loss)
    assert torch.equal(again[4][1], kl_loss) and not torch.equal(before[1], kl_loss)
    gradient = again[2] * 0.9 if name == "policy_loss" else calls[0][1][2]
    assert torch.equal(gradient, step(static, backend)[2])


@pytest.mark.skipif(GPU, reason="the graphs themselves are tested")
@pytest.mark.parametrize("name", STEPS)
def test_every_step_depends_on_its_inputs(name):
    """So a graph that did not follow would fail the test: gradients, losses and the KL term depend on the inputs."""
    static = Static("cpu")
    before = [x.clone() for x in STEPS[name](static, "cpu")]
    static.write(0, 0.9, 0.3)
    coefficients = STEPS[name](static, "cpu")
    assert all(torch.equal(*pair) for pair in zip(before, coefficients, strict=True)) == ("loss" not in name_of(name))
    static.write(1, 0.9, 0.3)
    assert not any(torch.equal(*pair) for pair in zip(coefficients, STEPS[name](static, "cpu"), strict=True))


def name_of(step):
    return "critic" if step in ("value_loss", "group_advantages", "gae") else "loss"

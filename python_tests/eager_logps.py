"""`token_logps` compared with eager code by the accuracy rule: values, entropy, sum p^2, gradients."""

import torch

import grpo_kernels as gk
from grpo_kernels.testing.compare import assert_as_accurate, relative_l2

HALF_STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6, torch.float64: 1e-12}


def eager(logits, targets, temperature=1.0, logit_scale=1.0, softcap=None):
    """The code of a trainer, in the dtype of the logits or in float32."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature, -1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0 * p).sum(-1)
    return logp.gather(-1, targets[..., None])[..., 0], entropy, p.square().sum(-1)


def run(fn, logits, targets, **options):
    """Outputs, and the gradient of a loss that depends on log-probs and entropy."""
    x = logits.clone().requires_grad_()
    logps, entropy, sum_p2 = fn(x, targets, **options)
    weights = torch.linspace(-1, 1, targets.numel()).view(targets.shape).to(logps.dtype)
    (g,) = torch.autograd.grad((logps * weights).sum() + 0.3 * (entropy * weights.flip(0)).sum(), x)
    return logps.detach(), entropy.detach(), sum_p2.detach(), g


def ours(logits, targets, backend="cpu", **options):
    return gk.token_logps(logits, targets, return_entropy=True, return_sum_p2=True, backend=backend, **options)


def check(logits, targets, what="", backend="cpu", **options):
    names = ("logps", "entropy", "sum_p2", "gradient")
    mine, theirs, exact = (
        run(ours, logits, targets, backend=backend, **options),
        run(eager, logits, targets, **options),
        run(eager, logits.double(), targets, **options),
    )
    for name, a, b, c in zip(names, mine, theirs, exact, strict=True):
        assert_as_accurate(a, b, c, what=f"{what} {name}")
    assert relative_l2(mine[3], exact[3]) <= 2 * relative_l2(theirs[3], exact[3]) + 1e-6
    column = [x[3].double().gather(-1, targets[..., None])[..., 0] for x in (mine, exact)]
    torch.testing.assert_close(
        column[0], column[1], rtol=2 * HALF_STEP[logits.dtype], atol=1e-6 if logits.dtype != torch.float64 else 1e-14
    )
    assert (mine[0] <= 0).all()

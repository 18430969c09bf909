"""What the loss reads in addition to log-probs: layout.PolicyInputs as kernel arguments, and one token's share.

A [B, T] view is three arguments: address, stride of the batch, stride of the tokens. An absent one has None for its
address, which Triton compiles away.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import Form, Scalars
from ...inputs.layout import PolicyInputs
from .launch import Constant, scalar_bits
from .math import ENTROPY_COEF, KL_COEF

SCALARS = Constant(len(Scalars._fields))
ADV, WEIGHT, OLD, REF, ROLLOUT, TOKEN_WEIGHT, ENTROPY_WEIGHT, ENTROPY_MASK, SELECTED, POOLED_WEIGHT = (
    Constant(i) for i in range(10)
)


def view_args(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if x is None else (x, x.stride(0), x.stride(1))


def policy_args(inputs: PolicyInputs) -> list[Any]:
    """The scalars, the coefficients given as tensors, the group's numbers, then the ten views, three arguments each, as
    in `load_token`."""
    adv = inputs.advantages
    views: Any = inputs[: PolicyInputs._fields.index("group_size")]
    return [
        scalar_args(inputs.scalars, adv.dtype), inputs.kl_coef, inputs.entropy_coef,
        inputs.group_size, scalar_bits(inputs.advantage_eps, adv.dtype),
        *(arg for x in views for arg in view_args(x)),
    ]  # fmt: skip


def form_args(inputs: PolicyInputs) -> dict[str, str]:
    """The constexprs that select the maths."""
    form = Form(*inputs.form)
    return {
        "OBJECTIVE": form.objective, "KL": form.kl_estimator, "KL_GRADIENT": form.kl_gradient,
        "ADVANTAGES": form.advantages,
    }  # fmt: skip


def scalar_args(scalars: Tensor, acc: torch.dtype) -> tuple[float, ...]:
    """The numbers of config.Scalars by value, so that a CUDA graph holds them and nothing is copied to the device.

    One tuple of floats, which Triton binds at once, never specialises, and rounds to float32. A float64 therefore
    travels as its bits, in three parts that float32 holds exactly.
    """
    if acc == torch.float32:
        return tuple(scalars.to(acc).tolist())
    parts = [(scalars.view(torch.int64) >> shift) & 0x3FFFFF for shift in (0, 22, 44)]
    return tuple(torch.stack(parts, 1).to(acc).flatten().tolist())


@triton.jit
def scalar(scalars, i: tl.constexpr, ACC: tl.constexpr):
    """Number i of `scalar_args`."""
    if ACC == tl.float32:
        return tl.full([], scalars[i], ACC)
    else:
        value = tl.zeros([], tl.int64)
        for part in tl.static_range(3):
            value |= tl.full([], scalars[3 * i + part], tl.float32).to(tl.int64) << 22 * part
        return value.to(tl.float64, bitcast=True)


@triton.jit
def coefficient(given, scalars, i: tl.constexpr, ACC: tl.constexpr):
    """What the tensor holds by now, if there is one."""
    if given is None:
        return scalar(scalars, i, ACC)
    else:
        return tl.load(given).to(ACC)


@triton.jit
def scalars_of(scalars, kl_coef, entropy_coef, ACC: tl.constexpr):
    """The numbers of config.Scalars, each by name: `s[EPS_LOW]`."""
    s = ()
    for i in tl.static_range(SCALARS):
        if i == KL_COEF:
            value = coefficient(kl_coef, scalars, i, ACC)
        elif i == ENTROPY_COEF:
            value = coefficient(entropy_coef, scalars, i, ACC)
        else:
            value = scalar(scalars, i, ACC)
        s = s + (value,)  # type: ignore[assignment]  # noqa: RUF005 - kernels know no unpacking
    return s


@triton.jit
def read(view, b, t, mask, absent, ACC: tl.constexpr):
    """Tokens (b, t), int64, of a view (address, strides); nothing is read where the mask is off. `absent` stands in for
    a view that is not given."""
    address, stride_b, stride_t = view
    if address is None:
        return absent
    else:
        return tl.load(address + b * stride_b + t * stride_t, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_token(b, t, mask, logp, views, ACC: tl.constexpr):
    """One token's share of each view, or a block's: (adv, weight, old, ...), by name `token[OLD]`.

    `views` holds (address, stride over b, over t) of each, then an advantage and whether it is every token's. `logp`
    stands in for what is not given: on-policy, a ratio of 1.
    """
    advs, weights, olds, refs, rollouts, token_weights, entropy_weights, entropy_masks, picks, pooled, own = views
    own_advantage, every = own
    one = tl.zeros_like(logp) + 1
    adv = one - 1 + own_advantage
    if not every:
        adv = read(advs, b, t, mask, adv, ACC)
    weight = read(weights, b, t, mask, one, ACC)
    return (
        adv,
        weight,
        read(olds, b, t, mask, logp, ACC),
        read(refs, b, t, mask, logp, ACC),
        read(rollouts, b, t, mask, logp, ACC),
        read(token_weights, b, t, mask, one, ACC),
        read(entropy_weights, b, t, mask, weight, ACC),
        read(entropy_masks, b, t, mask, one, ACC),
        read(picks, b, t, mask, one - 1, ACC),
        read(pooled, b, t, mask, one, ACC),
    )

"""What the loss reads in addition to log-probs: layout.PolicyInputs as kernel arguments, and one token's share.

A [B, T] view is three arguments: address, stride of the batch, stride of the tokens. An absent one has None for its
address, which Triton compiles away.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import Scalars
from ...inputs.layout import PolicyInputs
from .launch import scalar_bits
from .math import Token

SCALARS = tl.constexpr(len(Scalars._fields))
KL_COEF, ENTROPY_COEF = (tl.constexpr(Scalars._fields.index(name)) for name in ("kl_coef", "entropy_coef"))


class Views(NamedTuple):
    """A view, (address, stride over b, over t), of each field of `Token`."""

    adv: Any
    weight: Any
    old: Any
    ref: Any
    rollout: Any
    token_weight: Any
    entropy_weight: Any
    entropy_mask: Any
    selected: Any
    pooled_weight: Any
    own_adv: Any  # the advantage of all tokens, where the form makes it of rewards: `adv` is of rewards then


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
    """The numbers of config.Scalars, each by its name."""
    s = ()
    for i in tl.static_range(SCALARS):
        if i == KL_COEF:
            value = coefficient(kl_coef, scalars, i, ACC)
        elif i == ENTROPY_COEF:
            value = coefficient(entropy_coef, scalars, i, ACC)
        else:
            value = scalar(scalars, i, ACC)
        s = s + (value,)  # type: ignore[assignment]  # noqa: RUF005 - kernels know no unpacking here
    return Scalars(*s)  # type: ignore[call-arg]  # the loop has added one for each field


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
def load_token(b, t, mask, logp, views, FORM: tl.constexpr, ACC: tl.constexpr):
    """One token's share of each view, or a block's. `logp` stands in for what is not given: on-policy, a ratio of 1."""
    one = tl.zeros_like(logp) + 1
    adv = one - 1 + views.own_adv
    if FORM.advantages == "given":
        adv = read(views.adv, b, t, mask, adv, ACC)
    weight = read(views.weight, b, t, mask, one, ACC)
    return Token(
        adv,
        weight,
        read(views.old, b, t, mask, logp, ACC),
        read(views.ref, b, t, mask, logp, ACC),
        read(views.rollout, b, t, mask, logp, ACC),
        read(views.token_weight, b, t, mask, one, ACC),
        read(views.entropy_weight, b, t, mask, weight, ACC),
        read(views.entropy_mask, b, t, mask, one, ACC),
        read(views.selected, b, t, mask, one - 1, ACC),
        read(views.pooled_weight, b, t, mask, one, ACC),
    )

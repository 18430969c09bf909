"""What the loss reads beside the log-probs: layout.PolicyInputs as kernel arguments, and one token's share of them.

A [B, T] view is three arguments: address, stride of the batch, stride of the tokens. An absent one has None for its
address, which Triton compiles away.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import Form, Scalars
from ...layout import PolicyInputs
from .launch import bits

SCALARS = tl.constexpr(len(Scalars._fields))
ADV, WEIGHT, OLD, REF, ROLLOUT, TOKEN_WEIGHT, ENTROPY_WEIGHT, ENTROPY_MASK, SELECTED, POOLED_WEIGHT = (
    tl.constexpr(i) for i in range(10)
)

_captured: list[Tensor] = []


def view_args(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if x is None else (x, x.stride(0), x.stride(1))


def policy_args(inputs: PolicyInputs) -> list[Tensor | int | None]:
    """The scalars' address and the group's numbers, then the ten views, three arguments each, as in `load_token`."""
    adv = inputs.advantages
    views: Any = inputs[: PolicyInputs._fields.index("group_size")]
    return [
        device_scalars(inputs.scalars, adv.dtype, adv.device), inputs.group_size, bits(inputs.advantage_eps, adv.dtype),
        *(arg for x in views for arg in view_args(x)),
    ]  # fmt: skip


def form_args(inputs: PolicyInputs) -> dict[str, str]:
    """The constexprs that select the maths."""
    form = Form(*inputs.form)
    return {
        "OBJECTIVE": form.objective, "KL": form.kl_estimator, "KL_GRADIENT": form.kl_gradient,
        "ADVANTAGES": form.advantages,
    }  # fmt: skip


def device_scalars(scalars: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers of the loss where the kernel can read them, which no launch waits for.

    Kept, so that a loop whose coefficients stand still copies them once; by stream, as the copy is ordered in its own.
    A CUDA graph reads its address whenever it is replayed: those are kept for good.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    values = _device_scalars(tuple(scalars.tolist()), dtype, device, stream)
    if stream and torch.cuda.is_current_stream_capturing():
        _captured.append(values)
    return values


@functools.lru_cache(maxsize=256)
def _device_scalars(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@triton.jit
def load_scalars(scalars, REAL: tl.constexpr):
    """The numbers of config.Scalars, each by name: `s[EPS_LOW]`."""
    s = ()
    for i in tl.static_range(SCALARS):
        s = s + (tl.load(scalars + i).to(REAL),)  # type: ignore[assignment]  # noqa: RUF005 - kernels know no unpacking
    return s


@triton.jit
def read(view, b, t, mask, absent, REAL: tl.constexpr):
    """Tokens (b, t), int64, of a view (address, strides); nothing is read where the mask is off. `absent` stands in for
    a view that is not given."""
    if view[0] is None:
        return absent
    else:
        return tl.load(view[0] + b * view[1] + t * view[2], mask=mask, other=0.0).to(REAL)


@triton.jit
def load_token(b, t, mask, logp, views, REAL: tl.constexpr):
    """One token's share of each view, or a block's: (adv, weight, old, ...), by name `token[OLD]`.

    `views` holds the three arguments of each, one after the other, then an advantage and whether it is every token's.
    `logp` stands in for what is not given: on-policy, a ratio of 1.
    """
    one = tl.zeros_like(logp) + 1
    adv = one - 1 + views[30]
    if not views[31]:
        adv = read(views[0:3], b, t, mask, adv, REAL)
    weight = read(views[3:6], b, t, mask, one, REAL)
    return (
        adv,
        weight,
        read(views[6:9], b, t, mask, logp, REAL),
        read(views[9:12], b, t, mask, logp, REAL),
        read(views[12:15], b, t, mask, logp, REAL),
        read(views[15:18], b, t, mask, one, REAL),
        read(views[18:21], b, t, mask, weight, REAL),
        read(views[21:24], b, t, mask, one, REAL),
        read(views[24:27], b, t, mask, one - 1, REAL),
        read(views[27:30], b, t, mask, one, REAL),
    )

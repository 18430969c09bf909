"""What the loss reads beside the log-probs: layout.PolicyInputs as kernel arguments, and one token's share of them.

A [B, T] view is three arguments: address, stride of the batch, stride of the tokens. An absent one has None for its
address, which Triton compiles away.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import Form, Scalars
from ...layout import PolicyInputs

SCALARS = tl.constexpr(len(Scalars._fields))

_captured: list[Tensor] = []


def view_args(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if x is None else (x, x.stride(0), x.stride(1))


def policy_args(inputs: PolicyInputs) -> list[Tensor | int | None]:
    """The scalars' address, then the ten views in the order of `load_token`."""
    adv = inputs.advantages
    views = inputs[: PolicyInputs._fields.index("scalars")]
    return [device_scalars(inputs.scalars, adv.dtype, adv.device), *(arg for x in views for arg in view_args(x))]


def form_args(inputs: PolicyInputs) -> dict[str, str]:
    """The constexprs that select the maths."""
    form = Form(*inputs.form)
    return {"OBJECTIVE": form.objective, "KL": form.kl_estimator, "KL_GRADIENT": form.kl_gradient}


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
        s = s + (tl.load(scalars + i).to(REAL),)  # noqa: RUF005 - kernels know no unpacking
    return s


@triton.jit
def read(data, stride_b, stride_t, b, t, mask, absent, REAL: tl.constexpr):
    """Tokens (b, t) of a view, int64; nothing is read where the mask is off. `absent` stands in for a missing view, and
    gives the shape."""
    if data is None:
        return absent
    else:
        return tl.load(data + b * stride_b + t * stride_t, mask=mask, other=0.0).to(REAL)


@triton.jit
def load_token(
    b, t, mask, logp,
    adv, adv_b, adv_t, weight, weight_b, weight_t, old, old_b, old_t, ref, ref_b, ref_t,
    rollout, rollout_b, rollout_t, token_weight, token_weight_b, token_weight_t,
    entropy_weight, entropy_weight_b, entropy_weight_t, entropy_mask, entropy_mask_b, entropy_mask_t,
    selected, selected_b, selected_t, pooled_weight, pooled_weight_b, pooled_weight_t, REAL: tl.constexpr,
):  # fmt: skip
    """A token's (adv, weight, old, ref, rollout, token_weight, entropy_weight, entropy_mask, selected, pooled_weight).

    `logp` stands in for what is not given: on-policy, a ratio of 1. b and t must be int64: products pass 2^31.
    """
    zero = tl.zeros_like(logp)
    w = read(weight, weight_b, weight_t, b, t, mask, zero + 1, REAL)
    return (
        read(adv, adv_b, adv_t, b, t, mask, zero, REAL),
        w,
        read(old, old_b, old_t, b, t, mask, logp, REAL),
        read(ref, ref_b, ref_t, b, t, mask, logp, REAL),
        read(rollout, rollout_b, rollout_t, b, t, mask, logp, REAL),
        read(token_weight, token_weight_b, token_weight_t, b, t, mask, zero + 1, REAL),
        read(entropy_weight, entropy_weight_b, entropy_weight_t, b, t, mask, w, REAL),
        read(entropy_mask, entropy_mask_b, entropy_mask_t, b, t, mask, zero + 1, REAL),
        read(selected, selected_b, selected_t, b, t, mask, zero, REAL),
        read(pooled_weight, pooled_weight_b, pooled_weight_t, b, t, mask, zero + 1, REAL),
    )

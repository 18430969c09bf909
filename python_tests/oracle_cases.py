"""For the oracle tests: a batch that reaches every branch, our loss in all its variants, and a strict comparison.

An oracle computes in float64. Every input is exact in float32, so ours gets the same values in either dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import grpo_kernels as gk

EPS_LOW, EPS_HIGH, DELTA, DUAL_CLIP = 0.2, 0.28, 2.0, 3.0
EDGE = 5e-5  # the batch's distance from a bound; sums of float32 log-probs can still tell the sides apart
# Log-ratios just inside and just outside every bound, and 0.
BOUNDS = (1 - EPS_LOW, 1 + EPS_HIGH, DELTA, DUAL_CLIP)
NEAR_BOUNDS = [*(math.log(bound) + side for bound in BOUNDS for side in (-EDGE, EDGE)), 0.0]
ADVANTAGES = [1.3, -0.8, 0.0, 0.4, -1.7, 0.6, 0.9, -1.1, -0.5]
LENGTHS = [16, 16, 12, 0, 9, 1, 14, 16, 3]  # ragged; row 3 has no token at all
EMPTY_ROW = LENGTHS.index(0)
ROWS, WIDTH = len(LENGTHS), max(LENGTHS)
# The sum or mean of each row's log-ratios, for ratios per sequence: at both sides of every bound, for both signs of A.
SEQUENCE_LOG_RATIOS = [
    math.log(1 + EPS_HIGH) + EDGE, math.log(1 - EPS_LOW) - EDGE, 0.3, 0.0, math.log(1 - EPS_LOW) + EDGE,
    math.log(1 + EPS_HIGH) - EDGE, 0.1, math.log(DELTA) + EDGE, math.log(DELTA) - EDGE,
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A file that imports this runs on one thread: for small tensors, waiting for a second one takes longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Batch(NamedTuple):
    """Float64; [B, T] except for the advantages and the row weights."""

    logps: Tensor
    old: Tensor
    ref: Tensor
    roll: Tensor
    entropy: Tensor
    mask: Tensor  # int64
    advantages: Tensor  # [B]
    token_advantages: Tensor
    token_weights: Tensor
    row_weights: Tensor  # [B, 1]


def make_batch(
    level: str = "token",
    *,
    holes: bool = False,
    large: tuple[float, ...] = (),
    row_log_ratios: list[float] | None = None,
) -> Batch:
    """`level`: the ratio level at which log-ratios approach the bounds. `holes`: some tokens in the middle are masked.
    `large`: log-ratios, also to the reference, beyond the trainers' clamps, in every row that is long enough."""
    g = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
    if holes:
        mask[:, 8:11] = 0
        mask[6, 0] = 0
    old = -0.5 - torch.rand(ROWS, WIDTH, generator=g, dtype=torch.float64)
    x, u = 0.3 * normal(ROWS, WIDTH), 0.7 * normal(ROWS, WIDTH)
    x[:, : len(NEAR_BOUNDS)] = torch.tensor(NEAR_BOUNDS, dtype=torch.float64)
    if large:
        columns = slice(WIDTH - 1 - len(large), WIDTH - 1)
        x[:, columns] = torch.tensor(large, dtype=torch.float64)
        u[:, 6 : 6 + len(large)] = torch.tensor(large, dtype=torch.float64)
        old[:, columns] -= x[:, columns].clamp(min=0)  # log-probs stay below 0
    if level != "token":
        counts = mask.sum(-1).clamp(min=1)
        totals = torch.tensor(row_log_ratios or SEQUENCE_LOG_RATIOS, dtype=torch.float64)
        totals = totals if level == "product" else totals * counts
        x += ((totals - (x * mask).sum(-1)) / counts)[:, None]
    logps = (old + x).float().double()
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    others = [
        old, logps + u, old + 0.2 * normal(ROWS, WIDTH), 3 * torch.rand(ROWS, WIDTH, generator=g, dtype=torch.float64),
        mask, advantages, (advantages[:, None] + 0.3 * normal(ROWS, WIDTH)) * (advantages != 0)[:, None],
        (0.2 * normal(ROWS, WIDTH)).exp(), (0.2 * normal(ROWS, 1)).exp(),
    ]  # fmt: skip
    return Batch(logps, *(x.float().double() if x.is_floating_point() else x for x in others))


class Result(NamedTuple):
    loss: Tensor
    gradient: Tensor
    entropy_gradient: Tensor | None = None
    metrics: dict[str, Any] | None = None


def differentiated(oracle: Callable[..., Tensor], logps: Tensor, entropy: Tensor | None = None) -> Result:
    """An oracle's loss and gradients; the oracle is called with leaf tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in (logps, entropy) if x is not None]
    loss = oracle(*leaves)
    loss.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return Result(loss.detach(), gradients[0], gradients[1] if entropy is not None else None)


class Variant(NamedTuple):
    """A backend, dtype and layout in which ours runs."""

    backend: str
    dtype: torch.dtype
    packed: bool = False

    @property
    def tolerance(self) -> float:
        return 2e-5 if self.dtype == torch.float32 else 1e-9

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}{'-packed' if self.packed else ''}"


VARIANTS = [
    Variant("cpu", torch.float32),
    Variant("cpu", torch.float64),
    Variant("cpu", torch.float64, packed=True),
    Variant("reference", torch.float32, packed=True),
    Variant("reference", torch.float64),
]
PADDED = [Variant(backend, dtype) for backend in ("cpu", "reference") for dtype in (torch.float32, torch.float64)]


def poisoned(values: Tensor, mask: Tensor) -> Tensor:
    """Puts NaN and infinities wherever the mask is 0."""
    junk = torch.tensor([math.nan, math.inf, -math.inf], dtype=values.dtype)[torch.arange(values.numel()) % 3]
    return torch.where(mask != 0, values, junk.view(values.shape))


def ours(
    variant: Variant,
    config: gk.LossConfig,
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor | None = None,
    **others: Any,
) -> Result:
    """Our loss and gradients, [B, T], from inputs with poisoned masked values. Packed inputs have the rows end to end,
    an empty row without tokens, and a tail that belongs to no sequence."""
    kept = mask.flip(-1).cumsum(-1).flip(-1) > 0  # up to the last active token
    kept[0] = True
    tail = torch.full((2,), math.nan, dtype=torch.float64)

    def given(value: Any, dtype: torch.dtype = variant.dtype) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.shape != mask.shape:  # one per row; that of a row without tokens must not be read either
            value = torch.where(mask.any(-1).view(value.shape), value, math.nan)
            return (value.flatten() if variant.packed else value).to(dtype)
        value = poisoned(value, mask) if value.is_floating_point() else value
        return (torch.cat([value[kept], tail.to(value.dtype)]) if variant.packed else value).to(dtype)

    leaves = [given(x).clone().requires_grad_() for x in (logps, entropy) if x is not None]
    own_mask = given(mask, torch.int64)
    if variant.packed:
        own_mask[-2:] = 1
        others["cu_seqlens"] = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0)).int()
    if entropy is not None:
        others["entropy"] = leaves[1]
    out = gk.policy_loss(
        leaves[0], given(advantages), own_mask, config=config, backend=variant.backend,
        **{name: value if name in ("cu_seqlens", "entropy") else given(value) for name, value in others.items()},
    )  # fmt: skip
    out.loss.backward()

    def unpacked(gradient: Tensor | None) -> Tensor:
        gradient = torch.zeros_like(own_mask, dtype=torch.float64) if gradient is None else gradient.double()
        if variant.packed:
            assert not gradient[-2:].any(), "a token past the last boundary has a gradient"
            gradient = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(kept, gradient[:-2])
        return gradient

    gradients = [unpacked(x.grad) for x in leaves]
    metrics = {name: float(value) for name, value in out.metrics.items()}
    return Result(out.loss.detach().double(), gradients[0], gradients[1] if entropy is not None else None, metrics)


def assert_near(got: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    """The relative L2 error is within the tolerance, and no element's error exceeds 20 times that."""
    got, exact = got.double(), exact.double()
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)} for {tuple(exact.shape)}"
    assert got.isfinite().all() and exact.isfinite().all(), f"{what}: not finite: {got.tolist()} for {exact.tolist()}"
    error, size = (got - exact).abs(), exact.abs()
    relative = float(error.norm() / exact.norm()) if error.any() else 0.0
    assert relative <= tolerance, f"{what}: relative L2 {relative:.2e} > {tolerance:.0e}"
    floor = size[size > 0].median() if (size > 0).any() else 0.0
    worst = int((error - 20 * tolerance * (size + floor)).argmax())
    tiny = torch.finfo(torch.float32).tiny  # below this float32 is not exact
    assert (error <= 20 * tolerance * (size + floor) + tiny).all(), (
        f"{what}: element {worst} is {got.flatten()[worst]:.9g}, not {exact.flatten()[worst]:.9g}"
    )


def assert_same(got: Result, exact: Result, mask: Tensor, tolerance: float, what: str = "") -> None:
    """Compares loss and gradients. Ours is exactly 0 at masked tokens; the oracle's gradient is ignored there."""
    active = mask != 0
    assert_near(got.loss, exact.loss, tolerance, f"{what} loss")
    for name in ("gradient", "entropy_gradient"):
        mine, theirs = getattr(got, name), getattr(exact, name)
        if theirs is None:
            continue
        assert not mine[~active].any(), f"{what} {name}: a masked token is not 0"
        assert_near(mine[active], theirs[active], tolerance, f"{what} {name}")


def assert_matches(
    exact: Result,
    config: gk.LossConfig,
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor | None = None,
    *,
    metrics: dict[str, float] | None = None,
    tolerance: float = 0.0,
    **others: Any,
) -> None:
    """Compares ours, in all variants, with an oracle's result; `tolerance` is for trainers less exact than ours."""
    for variant in VARIANTS:
        got = ours(variant, config, logps, advantages, mask, entropy, **others)
        allowed = max(variant.tolerance, tolerance)
        assert_same(got, exact, mask, allowed, str(variant))
        for name, value in (metrics or {}).items():
            mine = got.metrics[name]
            assert abs(mine - value) <= 2e-5 * max(abs(value), 1e-3), f"{variant} {name}: {mine}, not {value}"

"""Liger's class and function, ours and Liger's own, on the same arguments: loss, gradients, metrics.

Liger's Triton kernels run in Triton's interpreter, so these tests need no GPU.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from oracle_cases import DELTA, EPS_HIGH, EPS_LOW, make_batch
from oracle_cases import one_thread as one_thread
from torch import Tensor

from grpo_kernels.integrations.liger import LigerFusedLinearGRPOLoss, patch_liger, triton_grpo_loss

chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="pip install liger-kernel==0.8.5")
from_logits = pytest.importorskip("liger_kernel.transformers.grpo_loss")
Theirs, their_function = chunked.LigerFusedLinearGRPOLoss, from_logits.triton_grpo_loss

HIDDEN, VOCAB, TOLERANCE = 12, 61, 2e-5
TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"beta": 0.3, "use_ref_model": True},
    "kl_corrected": {"beta": 0.3, "use_ref_model": True, "use_bias_correction_kl": True},
    "delta": {"delta": DELTA, "temperature": 0.7},
}
CASES = [
    (kind, level, option)
    for kind, level, option in itertools.product(TYPES, ("token", "sequence"), OPTIONS)
    if not (level == "sequence" and kind in ("cispo", "sapo", "vespo"))  # Liger refuses
    and not (option == "delta" and kind in ("cispo", "sapo", "vespo"))
    and not (kind == "luspo" and (level == "token" or "kl" in option))  # Liger averages over padding
]


def arguments(level: str = "token") -> dict[str, Tensor]:
    batch, g = make_batch(level), torch.Generator().manual_seed(3)
    shape = batch.mask.shape
    hidden, weight, bias = (torch.randn(s, generator=g) for s in ((*shape, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)))
    return {
        "_input": hidden, "lin_weight": weight * 0.3, "bias": bias,
        "selected_token_ids": torch.randint(VOCAB, shape, generator=g), "attention_mask": batch.mask,
        "advantages": batch.advantages.float(), "moved": (batch.logps - batch.old).float(),
        "away": (batch.logps - batch.ref).float(),
    }  # fmt: skip


def call_of(arguments: dict[str, Tensor], temperature: float = 1.0) -> dict[str, Any]:
    """ms-swift 4.6.0's call, by its keywords, without rollout weights."""
    a = dict(arguments)
    logits = (a["_input"] @ a["lin_weight"].T + a["bias"]) / temperature
    logps = logits.log_softmax(-1).gather(-1, a["selected_token_ids"][..., None])[..., 0]
    moved, away = a.pop("moved"), a.pop("away")
    return {**a, "old_per_token_logps": logps - moved, "ref_per_token_logps": logps - away, "vllm_is_ratio": None}


def outcome(module: torch.nn.Module, call: dict[str, Any]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    leaves = [call[name].clone().requires_grad_() for name in ("_input", "lin_weight", "bias")]
    loss, metrics = module(**{**call, **dict(zip(("_input", "lin_weight", "bias"), leaves, strict=True))})
    (3 * loss).backward()  # a gradient other than 1
    return loss.detach(), [x.grad for x in leaves], list(metrics)


def assert_same(got: Any, exact: Any, tolerance: float = TOLERANCE) -> None:
    for mine, value in zip((got[0], *got[1], *got[2]), (exact[0], *exact[1], *exact[2]), strict=True):
        scale = max(1.0, float(value.abs().max()))
        assert mine.shape == value.shape and (mine - value).abs().max() <= tolerance * scale


def options_of(kind: str, level: str, option: str) -> dict[str, Any]:
    return {
        "beta": 0.0, "use_ref_model": False, "compiled": False, "loss_type": kind, "epsilon_low": EPS_LOW,
        "importance_sampling_level": level, "epsilon_high": 1.1 if kind == "cispo" else EPS_HIGH,
        "max_completion_length": 64, **OPTIONS[option],
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "level", "option"), CASES)
def test_the_class(kind: str, level: str, option: str) -> None:
    options = options_of(kind, level, option)
    call = call_of(arguments(level), options.get("temperature", 1.0))
    if not options["use_ref_model"]:
        call["ref_per_token_logps"] = None
    assert_same(outcome(LigerFusedLinearGRPOLoss(**options), call), outcome(Theirs(**options), call))


@pytest.mark.parametrize("extra", ["token_weights", "row_weights", "items", "on_policy", "ref_input", "bfloat16_head"])
def test_arguments_of_a_call(extra: str) -> None:
    call, options = call_of(arguments()), options_of("dapo", "token", "kl")
    batch = make_batch()
    if extra == "token_weights":
        call["vllm_is_ratio"] = batch.token_weights.float()
    elif extra == "row_weights":
        call["vllm_is_ratio"] = batch.row_weights.float()[:, 0]
    elif extra == "items":
        call["num_items_in_batch"] = torch.tensor(150)
    elif extra == "on_policy":
        call["old_per_token_logps"] = None
    elif extra == "ref_input":
        call |= {"ref_per_token_logps": None, "ref_input": call["_input"] + 0.1, "ref_weight": call["lin_weight"] * 0.9}
    else:
        call["lin_weight"] = call["lin_weight"].bfloat16()
    tolerance = 0.01 if extra == "bfloat16_head" else TOLERANCE  # Liger adds up its gradient in bfloat16
    assert_same(outcome(LigerFusedLinearGRPOLoss(**options), call), outcome(Theirs(**options), call), tolerance)


def test_luspo_leaves_padding_out() -> None:
    """Per-token terms of luspo: the sum over a sequence's own tokens, as in TRL; Liger's value is another."""
    options, call = options_of("luspo", "token", "plain"), call_of(arguments())
    call["ref_per_token_logps"] = None
    mine, theirs = outcome(LigerFusedLinearGRPOLoss(**options), call), outcome(Theirs(**options), call)
    ratio = arguments()["moved"].exp()
    adv = call["advantages"][:, None]
    terms = -torch.minimum(ratio * adv, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * adv)
    exact = (terms * call["attention_mask"]).sum(-1).mean()
    assert abs(mine[0] - exact) < 1e-4 * exact.abs() and abs(theirs[0] - exact) > 1e-2 * exact.abs()


def test_masked_positions_are_not_read() -> None:
    options, call = options_of("dapo", "token", "plain"), call_of(arguments())
    call["ref_per_token_logps"] = None
    before = outcome(LigerFusedLinearGRPOLoss(**options), call)
    call["old_per_token_logps"] = call["old_per_token_logps"].masked_fill(call["attention_mask"] == 0, float("nan"))
    assert_same(outcome(LigerFusedLinearGRPOLoss(**options), call), before)
    assert outcome(Theirs(**options), call)[0].isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "fipo"}, "loss_type must be one of"),
        ({"loss_type": "sapo", "delta": 2.0}, "delta=2.0 is not used by loss_type='sapo'"),
        ({"loss_type": "dr_grpo"}, "needs max_completion_length"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "ratio_level='token' only"),
        ({"importance_sampling_level": "turn"}, "must be 'token' or 'sequence'"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be above 0"),
    ],
)
def test_what_cannot_be_honoured_raises_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)


def test_a_reference_that_would_be_dropped() -> None:
    call = call_of(arguments())
    with pytest.raises(ValueError, match="a reference would not be read"):
        LigerFusedLinearGRPOLoss(use_ref_model=False)(**call)
    with pytest.raises(ValueError, match="give ref_per_token_logps"):
        LigerFusedLinearGRPOLoss()(**{**call, "ref_per_token_logps": None})


def test_attributes_may_change_between_calls() -> None:
    loss = LigerFusedLinearGRPOLoss(beta=0.1)
    loss.beta = 0.2
    assert loss.config.kl_coef == 0.2
    loss.loss_type = "fipo"
    with pytest.raises(ValueError, match="loss_type"):
        loss(**call_of(arguments()))


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize(
    ("kind", "level", "option"),
    [("dapo", "token", "kl"), ("grpo", "sequence", "kl_corrected"), ("cispo", "token", "plain"), ("vespo", "token", "kl"),
     ("bnpo", "sequence", "delta"), ("sapo", "token", "kl_corrected"), ("dr_grpo", "token", "delta")],
)  # fmt: skip
def test_the_function(kind: str, level: str, option: str, reduce: bool) -> None:
    g = torch.Generator().manual_seed(5)
    batch, rows = make_batch(level), slice(4, 7)
    mask, advantages = batch.mask[rows, :9].int().contiguous(), batch.advantages[rows].float()
    logits = torch.randn(*mask.shape, VOCAB, generator=g)
    logits = torch.cat([logits, logits[:, :1]], dim=1)
    ids = torch.randint(VOCAB, mask.shape, generator=g)
    options = {"temperature": 1.0, "beta": 0.0, **OPTIONS[option]}
    options.pop("use_ref_model", None)
    logps = (logits[:, :-1] / options["temperature"]).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, ref = (logps - (batch.logps - x)[rows, :9].float() for x in (batch.old, batch.ref))
    upstream = torch.randn(mask.shape, generator=g)
    results = []
    for function in (triton_grpo_loss, their_function):
        leaf = logits.clone().requires_grad_()
        first, *others = function(
            leaf, old.contiguous(), ref.contiguous(), ids, advantages, mask, inplace=False, loss_type=kind,
            importance_sampling_level=level, reduce=reduce, eps_low=EPS_LOW,
            eps_high=1.1 if kind == "cispo" else EPS_HIGH, **options,
        )  # fmt: skip
        (first if reduce else (first * upstream).sum()).backward()
        flat = others[0] if reduce else [x for x in others if x is not None]
        results.append((first.detach(), [leaf.grad], [x.detach() for x in flat]))
    assert_same(*results)


def test_logits_are_overwritten_in_place() -> None:
    logits = torch.randn(2, 4, VOCAB, requires_grad=True)
    ids, mask = torch.randint(VOCAB, (2, 3)), torch.ones(2, 3, dtype=torch.int32)
    for reduce in (True, False):
        z = logits * 1.0
        z.retain_grad()
        loss = triton_grpo_loss(z, None, None, ids, torch.tensor([1.0, -1.0]), mask, beta=0.0, reduce=reduce)[0]
        loss.sum().backward()
        assert z.data_ptr() == z.grad.data_ptr() or torch.equal(z, z.grad)


def test_patch_and_undo() -> None:
    undo = patch_liger()
    try:
        assert chunked.LigerFusedLinearGRPOLoss is LigerFusedLinearGRPOLoss
        assert from_logits.triton_grpo_loss is triton_grpo_loss
        patch_liger()()  # twice changes nothing
        assert chunked.LigerFusedLinearGRPOLoss is LigerFusedLinearGRPOLoss
    finally:
        undo()
    assert chunked.LigerFusedLinearGRPOLoss is Theirs and from_logits.triton_grpo_loss is their_function


def test_another_release_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(Theirs):
        def forward(self, hidden: Tensor) -> None: ...

    monkeypatch.setattr(chunked, "LigerFusedLinearGRPOLoss", Changed)
    with pytest.raises(RuntimeError, match=r"written for liger-kernel 0\.8\.5"):
        patch_liger()

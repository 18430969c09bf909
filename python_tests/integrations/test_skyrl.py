"""SkyRL's registered losses: against formulas written out, and against its own functions where it is installed."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional  # names in SkyRL's annotations

import pytest
import torch
from peers import extracted

from grpo_kernels.integrations import skyrl

ROOT = Path(__file__).resolve().parents[2]
MODES = (
    "regular",
    "dual_clip",
    "gspo",
    "cispo",
    "sapo",
    "rollout_is",
    "dppo",
    "kl_cov",
    "importance_sampling",
    "cross_entropy",
)
CONFIG = SimpleNamespace(
    eps_clip_low=0.2, eps_clip_high=0.28, clip_ratio_c=1.4, loss_reduction="sequence_mean",
    cispo=SimpleNamespace(cispo_eps_clip_low=0.3, cispo_eps_clip_high=0.25), sapo=SimpleNamespace(tau_pos=1.0, tau_neg=1.1),
    dppo=SimpleNamespace(dppo_type="binary_tv", delta_low=0.05, delta_high=0.07),
    kl_cov=SimpleNamespace(kl_cov_frac=0.1, ppo_kl_coef=0.7),
)  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(4)

    def normal() -> torch.Tensor:
        return torch.randn(4, 6, generator=g, dtype=torch.float64)

    old = -normal().abs() - 0.05
    return {
        "log_probs": (old + 0.4 * normal()).clamp(max=-0.01).requires_grad_(), "old_log_probs": old,
        "advantages": normal(), "loss_mask": (torch.arange(6) < torch.tensor([6, 4, 1, 5])[:, None]).double(),
        "rollout_logprobs": (old + 0.2 * normal()).clamp(max=-0.01),
    }  # fmt: skip


def correct(old: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, config: Any) -> tuple:
    """Stands in for SkyRL's: truncated ratios, a masked token and a masked sequence."""
    kept = mask.clone()
    kept[0, 1] = 0
    kept[3] = 0
    return (old - rollout).exp().clamp(max=1.1), {"is_ratio_mean": 0.5}, kept


def written_out(mode: str, b: dict[str, torch.Tensor], config: Any) -> tuple[torch.Tensor, float | None]:
    lp, old, adv, mask, roll = b.values()
    behaviour = roll if mode in ("rollout_is", "dppo") else old
    x = lp - behaviour
    r = x.exp()
    low, high = 1 - config.eps_clip_low, 1 + config.eps_clip_high
    share = None
    if mode in ("regular", "dual_clip", "gspo"):
        if mode == "gspo":
            mean = (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
            r = (mean.detach() + lp - lp.detach()).exp()
        term = -torch.minimum(r * adv, r.clamp(low, high) * adv)
        share = ((r.clamp(low, high) * adv < r * adv) & (mask > 0)).sum() / mask.sum()
        if mode == "dual_clip":
            term = torch.where(adv < 0, torch.minimum(term, -config.clip_ratio_c * adv), term)
    elif mode == "cispo":
        low, high = 1 - config.cispo.cispo_eps_clip_low, 1 + config.cispo.cispo_eps_clip_high
        term = -r.clamp(low, high).detach() * adv * lp
        share = (((r < low) | (r > high)) & (mask > 0)).sum() / mask.sum()
    elif mode == "sapo":
        tau = torch.where(adv > 0, config.sapo.tau_pos, config.sapo.tau_neg).double()
        term, share = -torch.sigmoid(tau * (r - 1)) * 4 / tau * adv, torch.tensor(0.0)
    elif mode == "rollout_is":
        inside = (r > low) & (r < high)
        term = -(r * inside).detach() * adv * lp
        share = (~inside & (mask > 0)).sum() / mask.sum()
    elif mode == "dppo":
        p, q = lp.exp(), roll.exp()
        kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        away = (p - q).abs() if config.dppo.dppo_type == "binary_tv" else kl
        out = ((adv > 0) & (p > q) & (away > config.dppo.delta_high)) | (
            (adv < 0) & (p < q) & (away > config.dppo.delta_low)
        )
        term, share = -r * adv * ~out, (out & (mask > 0)).sum() / mask.sum()
    elif mode == "kl_cov":
        on = mask > 0
        cov = torch.where(on, (adv - adv[on].mean()) * (lp - lp[on].mean()), -torch.inf).detach().flatten()
        picked = torch.zeros(24, dtype=torch.bool)
        picked[cov.topk(max(1, int(on.sum() * config.kl_cov.kl_cov_frac))).indices] = True
        term, share = -r * adv + config.kl_cov.ppo_kl_coef * x.abs() * picked.view(4, 6), torch.tensor(0.0)
    elif mode == "importance_sampling":
        term = -r * adv
    else:
        term, share = -lp, torch.tensor(0.0)
    if mode not in ("kl_cov", "importance_sampling", "cross_entropy"):
        weights, _, mask = correct(old, roll, mask, None)
        term = term * weights
    return (term * mask).sum(), None if share is None else float(share)


@pytest.mark.parametrize("dppo_type", ["binary_tv", "binary_kl"])
@pytest.mark.parametrize("mode", MODES)
def test_formulas(mode: str, dppo_type: str) -> None:
    config = SimpleNamespace(
        **{
            **vars(CONFIG),
            "off_policy_correction": None,
            "dppo": SimpleNamespace(**{**vars(CONFIG.dppo), "dppo_type": dppo_type}),
        }
    )
    b = batch()
    mine, metrics = skyrl._policy_loss(mode, correct)(**b, config=config)
    exact, share = written_out(mode, b, config)
    torch.testing.assert_close(mine, exact, rtol=1e-7, atol=1e-9)
    a, c = (torch.autograd.grad(y, b["log_probs"])[0] for y in (mine, exact))
    torch.testing.assert_close(a, c, rtol=1e-7, atol=1e-9)
    assert ("is_ratio_mean" in metrics) == (mode not in ("kl_cov", "importance_sampling", "cross_entropy"))
    if share is not None:
        assert metrics["clip_ratio"] == pytest.approx(share, rel=1e-6)
        assert share > 0 or mode in ("sapo", "kl_cov", "cross_entropy")


OWN = {
    "regular": "ppo_policy_loss", "dual_clip": "ppo_policy_loss", "gspo": "gspo_policy_loss", "sapo": "sapo_policy_loss",
    "cispo": "compute_policy_loss_cispo", "rollout_is": "rollout_is_policy_loss", "dppo": "dppo_policy_loss",
    "kl_cov": "compute_policy_loss_kl_cov", "importance_sampling": "importance_sampling_loss",
    "cross_entropy": "cross_entropy_loss",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_skyrls_own(mode: str) -> None:
    def apply(loss: torch.Tensor, old: torch.Tensor, roll: torch.Tensor, mask: torch.Tensor, config: Any) -> tuple:
        weights, metrics, mask = correct(old, roll, mask, config)
        return loss * weights, mask, metrics

    scope = extracted(
        "skyrl", skyrl.RELEASE, "skyrl_train/utils/ppo_utils.py", (*OWN.values(), "reduce_loss"), torch=torch,
        Optional=Optional, Tuple=tuple, AlgorithmConfig=Any, PolicyLossType=SimpleNamespace(**{k.upper(): k for k in MODES}),
        register_policy_loss=lambda name: lambda function: function, apply_off_policy_correction=apply,
        masked_mean=lambda x, mask, dim=None: (x * mask).sum(dim=dim) / mask.sum(dim=dim).clamp(min=1.0),
        safe_exp_delta=lambda d, clip, out_dtype: d.clamp(-clip, clip).exp(),
    )  # fmt: skip
    config, b = SimpleNamespace(**vars(CONFIG), policy_loss_type=mode, off_policy_correction=None), batch()
    mine, metrics = skyrl._policy_loss(mode, correct)(**b, config=config)
    theirs, wanted = scope[OWN[mode]](**b, config=config)
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    a, c = (torch.autograd.grad(y, b["log_probs"])[0] for y in (mine, theirs))
    torch.testing.assert_close(a, c, rtol=1e-7, atol=1e-9)
    assert metrics == pytest.approx(wanted, rel=1e-6)


def modules(loss: Any) -> dict[str, types.ModuleType]:
    """SkyRL's two modules as far as `register` knows them; the whole needs Ray."""
    utils, correction = types.ModuleType("skyrl.utils"), types.ModuleType("skyrl.correction")
    registry: dict[str, Any] = {}
    utils.ppo_policy_loss = loss
    utils.PolicyLossRegistry = SimpleNamespace(register=registry.__setitem__, functions=registry)

    def compute_off_policy_correction(old_log_probs, rollout_logprobs, loss_mask, off_policy_correction):  # type: ignore[no-untyped-def]
        return correct(old_log_probs, rollout_logprobs, loss_mask, off_policy_correction)

    correction.compute_off_policy_correction = compute_off_policy_correction
    return {"ppo_utils": utils, "off_policy_correction_utils": correction}


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    def native(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None):  # type: ignore[no-untyped-def]
        raise AssertionError

    found = modules(native)
    monkeypatch.setattr(skyrl, "require", lambda name, *_: found[name.rpartition(".")[2]])
    names = skyrl.register()
    registry = found["ppo_utils"].PolicyLossRegistry.functions
    assert names == list(registry) == [f"gk_{mode}" for mode in MODES]
    b = batch()
    loss, metrics = registry["gk_regular"](**b, config=SimpleNamespace(**vars(CONFIG), off_policy_correction=None))
    torch.testing.assert_close(loss, written_out("regular", b, CONFIG)[0])
    assert metrics["is_ratio_mean"] == 0.5
    found["ppo_utils"].ppo_policy_loss = lambda log_probs, advantages: None
    with pytest.raises(
        RuntimeError, match=r"takes \(log_probs, advantages\); this integration was written for skyrl 0.3.0"
    ):
        skyrl.register()


def test_wrong_arguments() -> None:
    b, config = (
        batch(),
        SimpleNamespace(**{**vars(CONFIG), "off_policy_correction": None, "dppo": SimpleNamespace(dppo_type="top_k")}),
    )
    with pytest.raises(ValueError, match="dppo_type must be 'binary_tv' or 'binary_kl'; got 'top_k'"):
        skyrl._policy_loss("dppo", correct)(**b, config=config)
    del b["rollout_logprobs"]
    with pytest.raises(ValueError, match="rollout_is needs rollout_logprobs; got None"):
        skyrl._policy_loss("rollout_is", correct)(**b, config=config)


def test_not_installed() -> None:
    code = (
        "import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'skyrl' else f(name, *a)\n"
        "from grpo_kernels.integrations import skyrl; skyrl.register()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: this needs skyrl, which is not installed: pip install skyrl==0.3.0"
    )

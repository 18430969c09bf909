"""TRL's trainers on these kernels: `GRPOKernelsTrainer`, `RLOOKernelsTrainer`, and `patch_trl` for all the others.

TRL's fused head is a forward of the model that calls ``ChunkedLogProbFunction`` on the last hidden states. Here that
forward is kept, its code unchanged, and only the function is replaced:

* in two sweeps, by ``linear_token_logps``: TRL's own loss then works on our log-probs (8 N H V operations for N scored
  tokens, hidden size H and vocabulary V);
* in a single pass, by ``linear_grpo_loss``, which computes loss and gradients in the forward (6 N H V). TRL's
  ``_compute_loss`` runs on the detached log-probs: it logs its metrics under its own names, steps its entropy
  controller and adds the MoE loss, and its value is what the trainer returns; only the gradient is ours.

Since the loss is part of the model's forward, whatever wraps the model (DDP, FSDP, PEFT, accelerate) sees it.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from .. import LossConfig, LossOutput, grpo_loss, linear_grpo_loss, linear_token_logps, token_logps
from ._checks import digest, expect, require, version
from .counts import StepCounts
from .forward import Boxed

RELEASE = "1.16.0"  # what this was written for and is tested with
_utils: Any = require("trl.trainer.utils", "trl", RELEASE)
_kernels: Any = require("trl.kernels.chunked_logprob", "trl", RELEASE)
_grpo: Any = require("trl.trainer.grpo_trainer", "trl", RELEASE)
_rloo: Any = require("trl.trainer.rloo_trainer", "trl", RELEASE)

__all__ = ["GRPOKernelsTrainer", "RLOOKernelsTrainer", "TRLPatch", "patch_trl"]

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_TOLERANCE = 1e-5
_DIGESTS = {"GRPOTrainer": "16c4f3917b9f", "RLOOTrainer": "5ba97acf550f"}  # of `_compute_loss` in RELEASE


# --- what TRL must look like -----------------------------------------------------------------------------------------


def _check_head() -> None:
    """Raises RuntimeError if TRL's fused head is not the one of RELEASE."""
    expect(
        _utils.add_fused_lm_head, ["model", "temperature", "cast_lm_head_to_fp32", "outputs"], "trl", RELEASE
    )  # fmt: skip
    expect(
        _kernels.ChunkedLogProbFunction.forward,
        ["ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
         "logit_scale", "outputs"],
        "trl", RELEASE,
    )  # fmt: skip


def _check_trainer(trainer: type) -> None:
    """Raises RuntimeError for other signatures than RELEASE's; warns if only the loss's source has changed."""
    loss: Any = trainer._compute_loss  # type: ignore[attr-defined]
    scored: Any = trainer._get_per_token_logps_and_entropies  # type: ignore[attr-defined]
    expect(loss, ["self", "model", "inputs"], "trl", RELEASE)
    expect(
        scored,
        ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
         "compute_aux_loss", "..."],
        "trl", RELEASE,
    )  # fmt: skip
    if digest(loss) != _DIGESTS[trainer.__name__]:
        warnings.warn(
            f"{trainer.__name__}._compute_loss of trl {version('trl')} differs from trl {RELEASE}'s, which this "
            "integration was written for; the first steps are compared with TRL's own value",
            stacklevel=4,
        )


def _zero3() -> bool:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


# --- the lm_head -----------------------------------------------------------------------------------------------------


class _Head(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    lora: tuple[Tensor, Tensor, float] | None = None


def _whole(parameter: Tensor) -> Tensor:
    """A parameter that FSDP2 has sharded, gathered.

    Each rank's gradient is that of its own tokens. ``full_tensor()`` alone takes them for equal and keeps its shard of
    one of them; here they are averaged over the ranks, as FSDP2 does with a parameter that it gathers itself.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    ranks = parameter.device_mesh.size()
    whole = parameter.full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / ranks)
    return whole


def _lora(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """The one active LoRA adapter of PEFT's layer.

    Raises:
        NotImplementedError: if the layer computes anything else, and so must be called.
    """
    if not hasattr(layer, "lora_A"):
        raise NotImplementedError("an adapter other than LoRA")
    if layer.merged and layer.disable_adapters:
        raise NotImplementedError("PEFT has to take the adapter out of the weight first")
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or layer.disable_adapters or not names:
        return None
    dropout = layer.lora_dropout[names[0]]
    if (
        len(names) > 1
        or getattr(layer, "lora_variant", {}).get(names[0]) is not None  # DoRA and others
        or (getattr(dropout, "p", 0.0) > 0 and dropout.training)
        or type(layer.lora_A[names[0]]) is not nn.Linear
        or layer.lora_B[names[0]].bias is not None
    ):
        raise NotImplementedError("several adapters, dropout, a bias or a variant of LoRA")
    return layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight, float(layer.scaling[names[0]])


def _parameters(layer: Any, dtype: torch.dtype) -> _Head | None:
    """The lm_head as tensors, for hidden states of this dtype; None if its module has to be called."""
    lora = None
    if hasattr(layer, "base_layer"):
        try:
            lora = _lora(layer)
        except NotImplementedError:
            return None
        if _zero3():  # the adapter's own parameters are gathered when its module is called
            return None
        layer = layer.base_layer
    weight, bias = layer.weight, layer.bias
    if not weight.is_floating_point() or weight.dim() != 2:  # quantised
        return None

    def ready(x: Tensor) -> Tensor:
        return _whole(x).to(dtype)

    adapter = None if lora is None else (ready(lora[0]), ready(lora[1]), lora[2])
    return _Head(ready(weight), None if bias is None else ready(bias), adapter)


# --- the fused head --------------------------------------------------------------------------------------------------


class _Rows:
    """What takes ``ChunkedLogProbFunction``'s place in one forward of the fused head."""

    def __init__(self, layer: nn.Module, scored: Tensor, call: Boxed | None) -> None:
        self._layer, self._scored, self._call = layer, scored, call
        self.path = "two_sweeps"
        self.found: LossOutput | None = None

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """TRL's arguments for all positions: ``[B * L, H]`` hidden states, ``[B * L]`` targets."""
        transform = dict(temperature=float(temperature), logit_scale=float(logit_scale), softcap=softcap)
        scored = self._scored.to(hidden.device)
        hidden, targets = hidden.view(*scored.shape, -1), targets.view(scored.shape)
        if self._call is None:
            rows, head = self._rows(hidden)
            score: Callable = token_logps if head is None else linear_token_logps
            found = score(
                *rows, targets, mask=scored, return_entropy="entropy" in outputs,
                return_sum_p2="log_sum_sq_probs" in outputs, **(head or {}), **transform,
            )  # fmt: skip
            squares = None if found.sum_p2 is None else found.sum_p2.log()
            return _flat(found.logps), _flat(found.entropy), _flat(squares), None, None
        length = self._call.kwargs["mask"].shape[1]  # the completions
        rows, head = self._rows(hidden[:, -length:])
        loss: Callable = functools.partial(grpo_loss, inplace=True) if head is None else linear_grpo_loss
        arguments = {**self._call.kwargs, **(head or {}), **transform}
        arguments["mask"] = arguments["mask"].bool() & scored[:, -length:]
        self.found = loss(*rows, targets[:, -length:], return_entropy=True, **arguments)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows[0].dtype
        # GradScaler multiplies the loss later: in float16 most of a gradient that is written before would be 0.
        self.path = "two_sweeps" if dtype == torch.float16 else "single_pass"
        before = scored.shape[1] - length
        padded = (nn.functional.pad(x, (before, 0)) for x in (self.found.logps, self.found.entropy))  # type: ignore[arg-type]
        return *(_flat(x) for x in padded), None, None, None

    def _rows(self, hidden: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any] | None]:
        """Hidden states, weight and the head's other tensors by name; or logits and None."""
        head = _parameters(self._layer, hidden.dtype)
        if head is None:
            return (self._layer(hidden),), None
        return (hidden, head.weight), dict(bias=head.bias, lora=head.lora)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1)


class _FusedHead:
    """The fused head of one model: TRL's forward, with our kernels for its rows."""

    # Names of TRL's forward that get another meaning: the rows' function; whether to leave out positions that are not
    # scored (ours computes none of them, and keeps [B, L]); the type of weights that it gathers (none: `_whole` does).
    NAMES = ("_ChunkedLogProbFunction", "_use_triton", "DTensor")

    def __init__(self, model: Any) -> None:
        trl = model.forward.__func__
        if missing := [name for name in self.NAMES if name not in trl.__code__.co_names]:
            raise RuntimeError(
                f"the fused head of trl {version('trl')} does not use {', '.join(missing)}; this integration was "
                f"written for trl {RELEASE}, where it does"
            )
        self.path = ""  # of the last forward
        self.per_token_loss: Tensor | None = None

        @functools.wraps(type(model).forward)  # `generate` reads its signature
        def forward(
            this: Any, *args: Any, fused_lm_head: bool = False, grpo: Boxed | None = None, **kwargs: Any
        ) -> Any:
            if not fused_lm_head:
                return trl(this, *args, **kwargs)
            return self._run(trl, this, args, kwargs, grpo)

        model.forward = types.MethodType(forward, model)

    def _run(self, trl: Any, model: Any, args: tuple, kwargs: dict[str, Any], call: Boxed | None) -> Any:
        layer = model.get_output_embeddings()
        if call is None and torch.is_grad_enabled() and _zero3() and not hasattr(layer, "base_layer"):
            # In two sweeps the backward needs the weight, which is no longer gathered then; TRL's gathers it again.
            self.path = "native"
            return trl(model, *args, fused_lm_head=True, **kwargs)
        shifted = kwargs.get("shift_labels")
        labels = kwargs["labels"][:, 1:] if shifted is None else shifted
        rows = _Rows(layer, labels != -100, call)
        ours = types.FunctionType(
            trl.__code__,
            {**trl.__globals__, **dict(zip(self.NAMES, (rows, lambda device: False, ()), strict=True))},
            trl.__name__, trl.__defaults__, trl.__closure__,
        )  # fmt: skip
        ours.__kwdefaults__ = trl.__kwdefaults__
        output = ours(model, *args, fused_lm_head=True, **kwargs)
        self.path = rows.path
        if rows.found is not None:
            output.loss, self.per_token_loss = rows.found.loss, rows.found.per_token_loss
        return output


@contextmanager
def _names(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


# --- the trainers ----------------------------------------------------------------------------------------------------


class _OnKernels:
    """What both trainers share: TRL's fused head is ours, for the policy and for the reference model."""

    _module: Any
    step_counts: StepCounts

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _check_head()
        _check_trainer(self._trainer())
        config = kwargs.get("args") or next((x for x in args if hasattr(x, "use_liger_kernel")), None)
        if config is not None and config.use_liger_kernel:
            raise ValueError("use_liger_kernel=True: leave it out, these kernels take its place")
        self.step_counts = StepCounts()
        heads: list[_FusedHead] = []
        add = self._module.add_fused_lm_head

        def add_ours(model: Any, *args: Any, **kwargs: Any) -> None:
            add(model, *args, **kwargs)
            heads.append(_FusedHead(model))

        replaced: dict[str, Any] = {"add_fused_lm_head": add_ours}
        if hasattr(self._module, "BaseTunerLayer") and not getattr(config, "cast_lm_head_to_fp32", False):
            # TRL refuses LoRA on the lm_head, of which it reads no more than the weight; with a class that has no
            # instances it does not. Where the lm_head is cast to float32 it would go on without the adapter.
            replaced["BaseTunerLayer"] = type("NoLayer", (), {})
        with _names(self._module, **replaced):
            super().__init__(*args, **kwargs)
        if not heads:
            raise RuntimeError(
                f"{self._trainer().__name__} of trl {version('trl')} adds no fused head; trl {RELEASE}'s does"
            )
        self._head = heads[0]

    @classmethod
    def _trainer(cls) -> type:
        """TRL's class."""
        return next(c for c in cls.__mro__ if c.__module__ == cls._module.__name__)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        if torch.is_grad_enabled():
            setattr(self.step_counts, self._head.path, getattr(self.step_counts, self._head.path) + 1)
        return loss


class GRPOKernelsTrainer(_OnKernels, _grpo.GRPOTrainer):
    """TRL's ``GRPOTrainer``, the loss and its gradient computed by these kernels without ever holding the logits.

    Takes what ``GRPOTrainer`` takes, every option of ``GRPOConfig`` included except for ``use_liger_kernel``, and logs
    the same metrics, which TRL's own code computes. ``loss_type`` grpo, bnpo, dr_grpo, dapo, luspo, cispo and sapo at
    token level take a single pass. What needs the log-probs of a whole sequence or batch before the loss (vespo,
    ``importance_sampling_level="sequence"``, ``top_entropy_quantile``, ``off_policy_mask_threshold``), float16, and
    evaluation take two sweeps and TRL's own formula. A LoRA adapter on the lm_head is trained too; if it has dropout,
    its logits are computed by its module, and held.

    Args:
        verify: compare each single pass with TRL's own formula on the same log-probs. Otherwise only the first step of
            each kind is compared (with and without ``old_per_token_logps``, reference, sampler's ratios).
        *args, **kwargs: as for ``GRPOTrainer``.

    Attributes:
        step_counts: how many losses were computed on which path; one per micro-batch. Print it.

    Raises:
        ValueError: for ``use_liger_kernel=True``.
        RuntimeError: if TRL's functions do not have the signatures of the release that this was written for; during
            training, if the comparison fails. Both values come from the same float32 (or float64) log-probs, whatever
            the model's dtype, and differ by the rounding of their sums: 1e-5 of the largest token's loss is 80 times
            float32's epsilon; measured are 1.2e-7.
    """

    _module = _grpo

    def __init__(self, *args: Any, verify: bool = False, **kwargs: Any) -> None:
        self.verify = verify
        self._checked: set[tuple] = set()
        self._call: Boxed | None = None
        self._loss: Tensor | None = None
        self._aux: Tensor | None = None
        super().__init__(*args, **kwargs)

    def _loss_config(self) -> LossConfig | None:
        """TRL's loss; None where it needs the log-probs first."""
        args = self.args
        if (
            self.importance_sampling_level != "token"
            or self.top_entropy_quantile < 1
            or self.off_policy_mask_threshold is not None
        ):
            return None
        own: dict[str, Any]
        if self.loss_type in _CLIPPED:
            own = dict(eps_low=self.epsilon_low, eps_high=self.epsilon_high, delta=args.delta, ratio_level="token")
            if self.loss_type == "dr_grpo":
                own["max_length"] = self.max_completion_length
        elif self.loss_type == "cispo":
            own = dict(cispo_high=self.epsilon_high)
        elif self.loss_type == "sapo":
            own = dict(sapo_tau_pos=args.sapo_temperature_pos, sapo_tau_neg=args.sapo_temperature_neg)
        else:
            return None
        entropy_coef = self.entropy_coef if self._entropy_bonus_enabled else 0.0
        if self.use_adaptive_entropy and self._last_world_entropy > args.entropy_target:
            entropy_coef = 0.0
        return LossConfig.preset(
            f"trl_{self.loss_type}", entropy_coef=entropy_coef, kl_coef=self.beta,
            kl_gradient="importance_weighted" if args.use_bias_correction_kl else "pathwise", **own,
        )  # fmt: skip

    def _loss_arguments(self, inputs: dict[str, Any], config: LossConfig) -> dict[str, Any]:
        training, mask = self.model.training, inputs["completion_mask"]
        steps = self.current_gradient_accumulation_steps if training else 1
        denominator = None
        if self.loss_type in ("dapo", "cispo"):
            denominator = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            denominator = denominator / (self.args.steps_per_generation if training else 1)
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        return dict(
            advantages=inputs["advantages"],
            mask=mask * inputs["tool_mask"] if "tool_mask" in inputs else mask,
            old_logps=inputs.get("old_per_token_logps"),
            ref_logps=inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            token_weights=inputs["importance_sampling_ratio"] if corrects else None,
            denominator=denominator, scale=1 / steps, config=config,
        )  # fmt: skip

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        config = self._loss_config() if torch.is_grad_enabled() else None
        if config is None:
            return super()._compute_loss(model, inputs)
        self._call = Boxed(**self._loss_arguments(inputs, config))
        call = self._call
        try:
            native = super()._compute_loss(model, inputs)
        finally:
            self._call = None
        if self._loss is None:
            raise RuntimeError("_compute_loss did not ask for the log-probs, so there is no loss")
        ours, self._loss = self._loss, None
        self._check(native, ours, call)
        return native + (ours - ours.detach())

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple:
        call, self._call = self._call, None
        if call is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        outputs: list[Any] = []

        def with_loss(**inputs: Any) -> Any:
            outputs.append(model(**inputs, grpo=call))
            return outputs[-1]

        logps, entropy, aux = super()._get_per_token_logps_and_entropies(with_loss, *args, **kwargs)
        self._loss, self._aux = outputs[0].loss, aux
        old = call.kwargs["old_logps"]
        logps = logps.detach()
        if old is not None:  # TRL's formula multiplies what is masked by 0: its ratio must be finite
            logps = torch.where(call.kwargs["mask"].bool(), logps, old.to(logps.dtype))
        return logps, entropy.detach(), aux

    def _check(self, native: Tensor, ours: Tensor, call: Boxed) -> None:
        given = call.kwargs
        kind = tuple(given[name] is None for name in ("old_logps", "ref_logps", "token_weights"))
        if not self.verify and kind in self._checked:
            return
        self._checked.add(kind)
        value = native.detach()
        if self.aux_loss_enabled and self._aux is not None:
            value = value - self.router_aux_loss_coef * self._aux.detach() * given["scale"]
        largest = self._head.per_token_loss.abs().max()  # type: ignore[union-attr]
        if self.loss_type == "luspo":  # a sum over a sequence's tokens
            largest = largest * given["mask"].shape[1]
        theirs, mine, bound = torch.stack([value, ours.detach(), _TOLERANCE * (1 + largest)]).tolist()
        if not (abs(theirs - mine) <= bound or theirs == mine or (theirs != theirs and mine != mine)):
            raise RuntimeError(
                f"the loss is {mine:.9g}, by TRL's own formula {theirs:.9g}: loss_type={self.loss_type!r} of trl "
                f"{version('trl')} is not what this integration knows (trl {RELEASE}). A subclass's own loss, or "
                "another release's, needs TRL's GRPOTrainer with patch_trl()"
            )


class RLOOKernelsTrainer(_OnKernels, _rloo.RLOOTrainer):
    """TRL's ``RLOOTrainer``, its log-probs and their gradient computed by these kernels without holding the logits.

    The ratio is a product over the sequence, so each loss takes two sweeps, and its formula is TRL's. Takes what
    ``RLOOTrainer`` takes, except for ``use_liger_kernel``; ``step_counts``, LoRA on the lm_head, and the errors are
    those of `GRPOKernelsTrainer`.
    """

    _module = _rloo


# --- all trainers ----------------------------------------------------------------------------------------------------


class TRLPatch:
    """What `patch_trl` returns: call it, or leave its ``with`` block, to undo the patch.

    Attributes:
        step_counts: how many fused heads were computed since, ``two_sweeps`` by these kernels, ``native`` by TRL's.
    """

    def __init__(self) -> None:
        self.step_counts = StepCounts()
        self._native = (_utils._ChunkedLogProbFunction, _utils._use_triton)
        _utils._ChunkedLogProbFunction, _utils._use_triton = self, lambda device: True

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """``ChunkedLogProbFunction.apply``: ``[N, H]`` hidden states, ``[V, H]`` weight, ``[N]`` targets."""
        if torch.is_grad_enabled() and _zero3():  # its backward gathers the weight again
            self.step_counts.native += 1
            native: tuple = self._native[0].apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
            return native
        self.step_counts.two_sweeps += 1
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        found = linear_token_logps(
            hidden, weight, targets, bias=bias, temperature=float(temperature), softcap=final_logit_softcapping,
            logit_scale=float(logit_scale), return_entropy="entropy" in outputs,
            return_sum_p2="log_sum_sq_probs" in outputs, return_mean_logits="mean_logits" in outputs,
            return_is_top1="is_top1" in outputs,
        )  # fmt: skip
        squares = None if found.sum_p2 is None else found.sum_p2.log()
        return found.logps, found.entropy, squares, found.mean_logits, found.is_top1

    def undo(self) -> None:
        """TRL as it was. Undoing twice does nothing."""
        if _utils._ChunkedLogProbFunction is self:
            _utils._ChunkedLogProbFunction, _utils._use_triton = self._native

    def __call__(self) -> None:
        self.undo()

    def __enter__(self) -> TRLPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_trl() -> TRLPatch:
    """Makes every TRL trainer with a fused head (GRPO, RLOO, SFT, DPO, KTO, async) use our kernels for its rows.

    Log-probs, entropy, ``log sum p^2``, mean logits and top-1 flags come from ``linear_token_logps``, and so does their
    gradient; positions without a label are left out on every device. Losses stay TRL's. With DeepSpeed ZeRO-3 TRL's
    own function computes what needs a gradient, and ``step_counts.native`` says how often.

    Returns:
        TRLPatch: call it to undo the patch, or use it as a context manager.

    Raises:
        RuntimeError: if it is in force already; if TRL's functions do not have the signatures of the release that this
            was written for.
    """
    _check_head()
    if isinstance(_utils._ChunkedLogProbFunction, TRLPatch):
        raise RuntimeError("TRL is patched already: undo that first")
    return TRLPatch()

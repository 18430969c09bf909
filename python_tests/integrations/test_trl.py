"""TRL's trainers and ours, step by step: losses, gradient norms and every metric under its name."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402
from trl_cases import SMALL, VOCAB, build, metrics, tiny, train  # noqa: E402

from grpo_kernels.integrations import _checks  # noqa: E402
from grpo_kernels.integrations import trl as ours  # noqa: E402

ROOT = Path(__file__).parents[2]
MOE = dict(kind="olmoe", num_experts=4, num_experts_per_tok=2, output_router_logits=True)
TWO = dict(two_sweeps=True)
CASES: dict[str, dict[str, Any]] = {
    # the losses
    "dapo": dict(), "grpo": dict(loss_type="grpo"), "bnpo": dict(loss_type="bnpo"), "dr_grpo": dict(loss_type="dr_grpo"),
    "luspo": dict(loss_type="luspo"), "cispo": dict(loss_type="cispo", epsilon_high=1.3), "sapo": dict(loss_type="sapo"),
    "vespo": dict(loss_type="vespo", **TWO),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", **TWO),
    "luspo sequence": dict(loss_type="luspo", importance_sampling_level="sequence", **TWO),
    "cispo sequence": dict(loss_type="cispo", importance_sampling_level="sequence", **TWO),
    "sapo sequence": dict(loss_type="sapo", importance_sampling_level="sequence", **TWO),
    # what is added to them
    "delta": dict(delta=1.1, epsilon_high=0.3), "delta above": dict(delta=1.6),
    "kl": dict(beta=0.1), "kl without bias correction": dict(beta=0.1, use_bias_correction_kl=False),
    "kl gspo": dict(beta=0.1, loss_type="grpo", importance_sampling_level="sequence", **TWO),
    "kl vespo": dict(beta=0.1, loss_type="vespo", **TWO),
    "entropy": dict(entropy_coef=0.02), "entropy accumulated": dict(entropy_coef=0.02, gradient_accumulation_steps=2),
    "entropy cispo": dict(entropy_coef=0.02, loss_type="cispo", epsilon_high=1.3),
    "adaptive entropy": dict(entropy_coef=0.01, use_adaptive_entropy=True, entropy_target=2.9),
    "quantile": dict(top_entropy_quantile=0.5, **TWO), "off-policy mask": dict(off_policy_mask_threshold=0.01, **TWO),
    # the batch
    "accumulation": dict(gradient_accumulation_steps=4),
    "accumulation, grpo": dict(gradient_accumulation_steps=4, loss_type="grpo"),
    "several steps a generation": dict(gradient_accumulation_steps=2, steps_per_generation=4),
    "tools": dict(inputs="tools"),
    "vllm tokens": dict(inputs="ratios"), "vllm sequences": dict(inputs="sequence ratios"),
    "vllm cispo": dict(inputs="ratios", loss_type="cispo", epsilon_high=1.3),
    "vllm vespo": dict(inputs="ratios", loss_type="vespo", **TWO),
    "all": dict(inputs="ratios", beta=0.05, entropy_coef=0.01, delta=1.3, gradient_accumulation_steps=2),
    # the model
    "tied": dict(model=dict(tie_word_embeddings=True)), "softcap": dict(model=dict(kind="gemma2", final_logit_softcapping=5.0)),
    "logit scale": dict(model=dict(kind="cohere", logit_scale=0.5)),
    "logits scaling": dict(model=dict(kind="granite", logits_scaling=2.0)),
    "softcap gspo": dict(model=dict(kind="gemma2", final_logit_softcapping=5.0), loss_type="grpo", importance_sampling_level="sequence", **TWO),
    "moe": dict(model=MOE), "moe vespo": dict(model=MOE, loss_type="vespo", **TWO),
    "moe accumulated": dict(model=MOE, gradient_accumulation_steps=2, steps_per_generation=1, num_iterations=1),
    "head bias": dict(model=dict(kind="phi", partial_rotary_factor=0.5)),
    "fp32 head": dict(model=dict(dtype=torch.bfloat16), cast_lm_head_to_fp32=True),
    "fp32 head, tied": dict(model=dict(dtype=torch.bfloat16, tie_word_embeddings=True), cast_lm_head_to_fp32=True),
    "checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False)),
    "checkpointing, reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)),
    # PEFT
    "lora": dict(peft=dict(target_modules=["q_proj", "v_proj"])),
    "lora, kl": dict(peft=dict(target_modules=["q_proj", "v_proj"]), beta=0.1),
    "lora, head saved": dict(peft=dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "lora, checkpointing": dict(peft=dict(target_modules=["q_proj", "v_proj"]), gradient_checkpointing=True),
}  # fmt: skip
OFTEN = {
    "dapo", "luspo", "cispo", "sapo", "vespo", "gspo", "delta", "kl", "kl without bias correction", "adaptive entropy",
    "quantile", "off-policy mask", "several steps a generation", "tools", "vllm sequences", "all", "tied", "logits scaling",
    "softcap", "moe accumulated", "fp32 head", "checkpointing", "lora, kl", "lora, head saved", "head bias",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed(kind: str | None, trainer: Any) -> Any:
    """What a sampler on vLLM or tools would have added to the loss's inputs."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(5)

    def change(inputs: dict[str, Any]) -> dict[str, Any]:
        shape = inputs["completion_mask"].shape
        if kind == "tools":
            return inputs | {"tool_mask": (torch.rand(shape, generator=generator) < 0.7).int()}
        columns = 1 if kind == "sequence ratios" else shape[1]
        ratio = 0.5 + torch.rand(shape[0], columns, generator=generator)
        return inputs | {"importance_sampling_ratio": ratio}

    if "ratios" in kind:
        trainer.use_vllm = True
        trainer.vllm_importance_sampling_correction = True
        prepare = trainer._prepare_inputs

        def prepared(batch: Any) -> Any:
            trainer.use_vllm = False  # generation is by transformers
            result = prepare(batch)
            trainer.use_vllm = True
            return result

        trainer._prepare_inputs = prepared
    return change


def run(trainer: type, case: dict[str, Any], **options: Any) -> tuple[Any, list[float]]:
    case = dict(case)
    case.pop("two_sweeps", None)
    inputs, model, lora = case.pop("inputs", None), tiny(**case.pop("model", {})), case.pop("peft", None)
    adapter = None if lora is None else peft.LoraConfig(r=4, task_type="CAUSAL_LM", lora_dropout=0.0, **lora)
    config = RLOOConfig if issubclass(trainer, RLOOTrainer) else GRPOConfig
    made = build(trainer, config, model, peft=adapter, ours=options, **case)
    return made, train(made, changed(inputs, made))


def same(
    native: Any, mine: Any, losses: tuple[list[float], list[float]], loss: float = 1e-6, norm: float = 1e-5
) -> None:
    assert losses[0] == pytest.approx(losses[1], rel=loss, abs=loss)
    assert any(abs(x) > 1e-4 for x in losses[0])
    theirs, found = metrics(native), metrics(mine)
    assert len(theirs) == len(found) >= 3
    for entry, other in zip(theirs, found, strict=True):
        assert entry.keys() == other.keys()
        for name, value in entry.items():
            assert value == pytest.approx(other[name], rel=norm, abs=1e-5), name
    for (name, x), (_, y) in zip(native.model.named_parameters(), mine.model.named_parameters(), strict=True):
        tolerance = 1e-2 if x.dtype == torch.bfloat16 else 2e-4  # Adam's first steps are signs: small ones may differ
        assert (x - y).abs().max() <= tolerance, name


@pytest.mark.soak_where(lambda name: name not in OFTEN)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_grpo_trainer(name: str) -> None:
    case = CASES[name]
    native, theirs = run(GRPOTrainer, case)
    mine, found = run(ours.GRPOKernelsTrainer, case, verify=True)
    tolerance = 1e-5 if case.get("loss_type") == "vespo" else 1e-6
    same(native, mine, (theirs, found), tolerance)
    counts = mine.step_counts
    path, other = (
        (counts.two_sweeps, counts.single_pass) if case.get("two_sweeps") else (counts.single_pass, counts.two_sweeps)
    )
    assert (path, other, counts.native) == (len(found), 0, 0)


@pytest.mark.soak_where(lambda dtype: dtype == "model")
@pytest.mark.parametrize("dtype", ["autocast", "model"])
def test_bfloat16(dtype: str) -> None:
    """Both round; the metrics and norms agree to bfloat16's rounding, the self-check to float32's."""
    case = dict(bf16=True) if dtype == "autocast" else dict(model=dict(dtype=torch.bfloat16))
    case["max_steps"] = 2
    native, theirs = run(GRPOTrainer, case)
    mine, found = run(ours.GRPOKernelsTrainer, case, verify=True)
    assert theirs == pytest.approx(found, abs=2e-2)
    assert metrics(native)[0]["grad_norm"] == pytest.approx(metrics(mine)[0]["grad_norm"], rel=2e-2)
    assert mine.step_counts.single_pass == 2


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_agrees_with_rloo_trainer(beta: float) -> None:
    native, theirs = run(RLOOTrainer, dict(beta=beta))
    mine, found = run(ours.RLOOKernelsTrainer, dict(beta=beta))
    same(native, mine, (theirs, found))
    assert (mine.step_counts.two_sweeps, mine.step_counts.native) == (3, 0)


def test_evaluation() -> None:
    theirs = build(GRPOTrainer, GRPOConfig, tiny()).evaluate()
    mine = build(ours.GRPOKernelsTrainer, GRPOConfig, tiny())
    found = mine.evaluate()
    assert theirs.keys() == found.keys()
    assert theirs["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-6)
    assert theirs["eval_entropy"] == pytest.approx(found["eval_entropy"], rel=1e-5)
    assert str(mine.step_counts) == "0 in a single pass, 0 in two sweeps, 0 by the trainer"


# --- LoRA on the lm_head, which TRL refuses ---------------------------------------------------------------------------


class ByHand(GRPOTrainer):
    """TRL's formula on log-probs of the whole logits, for what its fused head cannot do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from trl.trainer import grpo_trainer

        with ours._names(grpo_trainer, BaseTunerLayer=type("NoLayer", (), {})):
            super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *_: Any, **__: Any
    ):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
        logps = (logits / self.temperature).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, input_ids[:, -logits_to_keep:, None]).squeeze(-1), entropy, None


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
@pytest.mark.parametrize("how", ["lora", "dora"])
def test_lora_on_the_head(how: str, loss_type: str) -> None:
    def trainer(kind: type) -> Any:
        adapter = peft.LoraConfig(
            r=4, lora_alpha=12, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], use_dora=how == "dora",
            lora_dropout=0.0, init_lora_weights=False,
        )  # fmt: skip
        torch.manual_seed(7)
        options = dict(beta=0.05, num_iterations=1, loss_type=loss_type, max_steps=2)
        return build(
            kind, GRPOConfig, tiny(), peft=adapter, ours=dict(verify=True) if kind is not ByHand else {}, **options
        )

    native = trainer(ByHand)
    theirs = train(native)
    mine = trainer(ours.GRPOKernelsTrainer)
    found = train(mine)
    assert mine.step_counts.native == 0
    layer = mine.model.get_output_embeddings()
    assert layer.lora_A["default"].weight.grad is None or layer.lora_A["default"].weight.grad.any()
    assert (ours._parameters(layer.train(), torch.float32) is None) == (how != "lora")
    tolerance = 1e-5 if loss_type == "vespo" else 2e-6
    assert theirs == pytest.approx(found, rel=tolerance, abs=tolerance)
    for entry, other in zip(metrics(native), metrics(mine), strict=True):
        assert entry.get("grad_norm", 0.0) == pytest.approx(other.get("grad_norm", 0.0), rel=2e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_lora_with_dropout_on_the_head(loss_type: str) -> None:
    """Its module is called, with dropout; which entries are dropped depends on the shape, so no other run agrees."""
    adapter = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"], lora_dropout=0.5)
    mine = build(ours.GRPOKernelsTrainer, GRPOConfig, tiny(), peft=adapter, ours=dict(verify=True), loss_type=loss_type)
    layer = mine.model.get_output_embeddings()
    assert ours._parameters(layer.train(), torch.float32) is None
    head = ours._parameters(layer.eval(), torch.float32)
    assert head is not None and head.lora is not None
    before = layer.lora_B["default"].weight.clone()
    losses = train(mine)
    assert mine.step_counts.native == 0 and all(abs(x) < 10 for x in losses)
    assert (layer.lora_B["default"].weight != before).all()


def test_lora_of_a_merged_or_disabled_adapter() -> None:
    adapter = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny(), adapter)
    layer = model.get_output_embeddings()
    hidden = torch.randn(3, 32)

    def logits() -> torch.Tensor:
        head = ours._parameters(layer, torch.float32)
        assert head is not None
        weight = head.weight if head.lora is None else head.weight + head.lora[2] * head.lora[1] @ head.lora[0]
        return hidden @ weight.t()

    plain = logits()
    torch.testing.assert_close(plain, layer(hidden))
    with model.disable_adapter():
        torch.testing.assert_close(logits(), layer(hidden))
        assert (logits() - plain).abs().max() > 1e-3
    layer.merge()
    torch.testing.assert_close(logits(), plain)
    layer.enable_adapters(False)
    assert ours._parameters(layer, torch.float32) is None  # PEFT unmerges it in its forward


def test_quantised_heads_are_called() -> None:
    layer = torch.nn.Linear(4, 6)
    layer.weight = torch.nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    assert ours._parameters(layer, torch.float32) is None


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, config", [(ours.GRPOKernelsTrainer, GRPOConfig), (ours.RLOOKernelsTrainer, RLOOConfig)])
def test_liger_is_refused_at_construction(kind: type, config: type) -> None:
    with pytest.raises(ValueError, match="use_liger_kernel=True"):
        build(kind, config, tiny(), use_liger_kernel=True)


def test_a_cast_head_with_an_adapter_is_refused_at_construction() -> None:
    adapter = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        build(ours.GRPOKernelsTrainer, GRPOConfig, tiny(), peft=adapter, cast_lm_head_to_fp32=True)


def test_other_signatures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def _compute_loss(self: Any, model: Any, inputs: Any, other: Any) -> None: ...

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", _compute_loss)
    with pytest.raises(
        RuntimeError, match=r"_compute_loss of trl 1\.\d+.* takes \(self, model, inputs, other\).*1\.16\.0"
    ):
        build(ours.GRPOKernelsTrainer, GRPOConfig, tiny())


@pytest.mark.parametrize("name", ["_get_per_token_logps_and_entropies"])
def test_other_leading_arguments_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RLOOTrainer, name, lambda self, model, ids: None)
    with pytest.raises(RuntimeError, match=r"1\.16\.0"):
        build(ours.RLOOKernelsTrainer, RLOOConfig, tiny())


def test_another_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours._kernels.ChunkedLogProbFunction, "forward", staticmethod(lambda ctx, hidden, weight: None))
    with pytest.raises(RuntimeError, match=r"takes \(ctx, hidden, weight\)"):
        ours.patch_trl()
    assert not isinstance(ours._utils._ChunkedLogProbFunction, ours.TRLPatch)


def test_another_fused_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours._FusedHead, "NAMES", ("_ChunkedLogProbFunction", "_renamed"))
    with pytest.raises(RuntimeError, match=r"does not use _renamed.*1\.16\.0"):
        build(ours.GRPOKernelsTrainer, GRPOConfig, tiny())


def test_changed_source_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ours._DIGESTS, "GRPOTrainer", "0" * 12)
    with pytest.warns(UserWarning, match=r"GRPOTrainer\._compute_loss of trl .* differs"):
        ours._check_trainer(GRPOTrainer)


def test_the_installed_release_is_the_known_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours._check_trainer(GRPOTrainer)
        ours._check_trainer(RLOOTrainer)


def test_another_formula_is_noticed_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    native = GRPOTrainer._compute_loss
    monkeypatch.setitem(ours._DIGESTS, "GRPOTrainer", "anything")
    monkeypatch.setattr(ours, "_check_trainer", lambda trainer: None)
    monkeypatch.setattr(
        GRPOTrainer, "_compute_loss", lambda self, model, inputs: native(self, model, inputs) * 1.001 + 1e-3
    )
    with pytest.raises(RuntimeError, match=r"by TRL's own formula .*loss_type='dapo'"):
        train(build(ours.GRPOKernelsTrainer, GRPOConfig, tiny()))


def test_not_installed() -> None:
    code = (
        "import sys, importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'trl' else f(name, *a)\n"
        "import grpo_kernels.integrations.trl"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: this needs trl, which is not installed: pip install trl==1.16.0"
    )


# --- patch_trl --------------------------------------------------------------------------------------------------------

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def head_outputs(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    (found.log_probs.sum() + 0.3 * found.entropy.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {k: getattr(found, k).detach() for k in ALL} | {"loss": found.loss.detach()} | gradients


@pytest.mark.parametrize(
    "kind, options",
    [("llama", {}), ("gemma2", dict(final_logit_softcapping=5.0)), ("granite", dict(logits_scaling=2.0))],
)
@pytest.mark.parametrize("scored", ["some", "none"])
def test_patched_heads(kind: str, options: dict[str, Any], scored: str) -> None:
    model = tiny(kind, **options)
    ours._utils.add_fused_lm_head(model, temperature=0.8, outputs=ALL)
    ids = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, : 4 if scored == "some" else 11] = -100
    native = head_outputs(model, ids, labels)
    with ours.patch_trl() as patch:
        found = head_outputs(model, ids, labels)
    assert patch.step_counts.two_sweeps == 1
    assert native.keys() == found.keys()
    for name, value in native.items():
        assert (found[name].float() - value.float()).abs().max() <= 1e-6 + 5e-6 * value.float().abs().max(), name
    if scored == "some":
        assert native["log_probs"].any()


def test_undo() -> None:
    before = ours._utils._ChunkedLogProbFunction, ours._utils._use_triton
    undo = ours.patch_trl()
    with pytest.raises(RuntimeError, match="patched already"):
        ours.patch_trl()
    undo()
    undo()
    assert (ours._utils._ChunkedLogProbFunction, ours._utils._use_triton) == before
    with pytest.raises(KeyError), ours.patch_trl():
        raise KeyError
    assert (ours._utils._ChunkedLogProbFunction, ours._utils._use_triton) == before


def test_patched_grpo_trainer() -> None:
    native, theirs = run(GRPOTrainer, dict(beta=0.1))
    with ours.patch_trl() as patch:
        mine, found = run(GRPOTrainer, dict(beta=0.1))
    same(native, mine, (theirs, found))
    assert patch.step_counts.two_sweeps >= 3
    assert "in two sweeps" in str(patch.step_counts)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_patched_trainers_with_accuracy(kind: str, tmp_path: Path) -> None:
    """SFT logs the share of top-1 tokens, DPO the mean logits too."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl_cases import tokenizer

    options: dict[str, Any] = dict(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True,
        bf16=False, disable_tqdm=True, save_strategy="no", learning_rate=1e-3, gradient_checkpointing=False,
    )  # fmt: skip
    rows = [{"prompt": f"w{i} w9", "chosen": f"w{i + 1} w7 w8", "rejected": f"w{i + 2} w5"} for i in range(10, 18)]

    def trained() -> list[dict[str, float]]:
        if kind == "sft":
            data = Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows])
            trainer: Any = SFTTrainer(tiny(), SFTConfig(**options), train_dataset=data, processing_class=tokenizer())
        else:
            model = tiny()
            model.config._name_or_path = str(tmp_path / "model")  # the reference model is loaded again
            model.save_pretrained(model.config._name_or_path)
            trainer = DPOTrainer(
                model, args=DPOConfig(**options), train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
            )
        trainer.train()
        return metrics(trainer)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        native = trained()
        with ours.patch_trl() as patch:
            found = trained()
    assert patch.step_counts.two_sweeps >= 2 and patch.step_counts.native == 0
    for entry, other in zip(native, found, strict=True):
        assert entry.keys() == other.keys()
        for name, value in entry.items():
            assert value == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert any("accuracy" in name or "logits" in name for name in native[0])


# --- what cannot run here, or runs in processes of its own -----------------------------------------------------------


def test_zero3_in_two_sweeps_is_trls_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed is not installed: only the choice of the path is tested."""
    monkeypatch.setattr(ours, "_zero3", lambda: True)
    mine, _ = run(ours.GRPOKernelsTrainer, dict(loss_type="vespo", max_steps=1))
    assert (mine.step_counts.native, mine.step_counts.two_sweeps) == (1, 0)
    mine, _ = run(ours.GRPOKernelsTrainer, dict(max_steps=1))
    assert mine.step_counts.single_pass == 1
    with ours.patch_trl() as patch:
        run(GRPOTrainer, dict(max_steps=1, num_iterations=1))
    assert patch.step_counts.native == 1


def test_float16_takes_two_sweeps() -> None:
    """GradScaler multiplies the loss after the forward; a gradient written before would underflow."""
    model = tiny(dtype=torch.float16)
    ours._utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    head = ours._FusedHead(model)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 5, dtype=torch.int)
    call = ours.Boxed(
        advantages=torch.tensor([1e-4, -1e-4]), mask=mask, config=ours.LossConfig.preset("trl_grpo"), scale=0.5
    )
    loss = model(input_ids=ids, labels=ids, fused_lm_head=True, grpo=call).loss
    assert head.path == "two_sweeps"
    (loss * 65536).backward()
    gradient = model.get_output_embeddings().weight.grad
    assert (gradient != 0).float().mean() > 0.9


def spawn(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("trl_ranks.py")), name], capture_output=True, text=True, cwd=ROOT, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_ranks(name: str) -> None:
    spawn(name)


@pytest.mark.parametrize("script", ["trl_grpo.py", "trl_grpo_peft.py"])
def test_examples(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), "--steps", "2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 in a single pass, 0 in two sweeps, 0 by the trainer" in done.stdout


def test_token_types_and_pixels_reach_the_trunk() -> None:
    """What `_fused_forward` is given besides ids and mask goes on unchanged: as for vision-language models."""
    model = tiny()
    seen: dict[str, Any] = {}
    trunk = model.base_model
    forward = trunk.forward
    trunk.forward = lambda *args, pixel_values=None, token_type_ids=None, **kwargs: (
        seen.update(pixel_values=pixel_values, token_type_ids=token_type_ids) or forward(*args, **kwargs)
    )
    ours._utils.add_fused_lm_head(model, outputs=("log_probs",))
    native = copy.copy(model.forward)
    ours._FusedHead(model)
    ids, pixels = torch.arange(3, 13).view(1, 10), torch.randn(1, 3, 4, 4)
    arguments = dict(input_ids=ids, labels=ids, fused_lm_head=True, pixel_values=pixels, token_type_ids=ids)
    found = model(**arguments)
    assert seen["pixel_values"] is pixels and seen["token_type_ids"] is ids
    torch.testing.assert_close(found.log_probs, native(**arguments).log_probs, rtol=1e-5, atol=1e-6)
    assert SMALL["vocab_size"] == VOCAB and _checks.version("trl") == trl.__version__

"""Compiles the Triton kernels per token and per sample for a GPU that need not be here; `python dry_tokens.py cuda 90`.
Run by test_triton_token.py in a process of its own."""

import sys

import torch
from forms import FORMS

import grpo_kernels as gk
from grpo_kernels.backends import triton as backend
from grpo_kernels.backends.triton import launch
from grpo_kernels.backends.triton.advantages import batch_kernel, group_kernel
from grpo_kernels.backends.triton.diversity import greedy, greedy_kernel
from grpo_kernels.backends.triton.returns import gae_kernel, value_kernel
from grpo_kernels.backends.triton.scale import scale_kernel
from grpo_kernels.backends.triton.token import token_kernel
from grpo_kernels.inputs.grouping import BASELINES, SCALES, AdvantageForm, Samples
from grpo_kernels.inputs.layout import layout_of
from grpo_kernels.loss.policy import Advantages, LossArguments, policy_inputs
from dry_driver import SHARED_BYTES, WIDE, assembly, constants_of, dry_run, resources

ARCH = int(sys.argv[2]) if sys.argv[1] == "cuda" else sys.argv[2]
DRY = dry_run(sys.argv[1], ARCH)
KERNELS = (token_kernel, group_kernel, batch_kernel, gae_kernel, value_kernel, greedy_kernel, scale_kernel)


def token_loss(config, batch, tokens, real=torch.float32, cu_seqlens=None, advantages=None):
    x = torch.zeros(1, 1, dtype=real).expand(batch, tokens)
    active = torch.ones(1, 1, dtype=torch.bool).expand(batch, tokens)
    layout = layout_of(torch.Size([tokens]) if cu_seqlens is not None else x.shape, cu_seqlens)
    flat = x.reshape(layout.shape) if cu_seqlens is not None else x
    inputs = policy_inputs(
        layout, active, real, config, advantages or Advantages(flat),
        LossArguments(flat, flat, flat, token_weights=flat),
    )  # fmt: skip
    backend.token_policy(x, x if config.has_entropy else None, active, layout.cu_seqlens, inputs)


def variants():
    return {kernel.__name__: len(DRY.variants(kernel)) for kernel in KERNELS}


def one_variant_for_all_shapes_and_numbers():
    for i in range(20):
        config = gk.LossConfig(kl_coef=0.01 * (i + 1), eps_low=0.1 + 0.01 * i, entropy_coef=0.01 * (i + 1))
        token_loss(config, 1 + 37 * i, 1 + 211 * i)
        rewards, valid = torch.zeros(16 * (1 + i), 1), torch.ones(16 * (1 + i), dtype=torch.bool)
        form = AdvantageForm(1 << (i % 5), "mean", "batch", i % 2, 1e-4 * (1 + i), 0.0, -9.0, 9.0 + i, i % 2 == 0)
        backend.group_advantages(Samples(rewards, None, valid, None, None, None), form)
        grid = torch.zeros(1 + i, 1 + 500 * i)
        active = torch.ones_like(grid, dtype=torch.bool)
        backend.gae(grid, grid, active, None, 0.9 + 0.005 * i, 0.95)
        backend.value_loss(grid, grid, grid, grid, active, 0.1 + 0.01 * i)
        backend.scale(torch.zeros(1 + i, 3, 5 + 7 * i).bfloat16(), torch.ones(()))
        backend.scale(torch.zeros(1 + i, 3, 64 + 8 * i).bfloat16()[..., : 8 + i], torch.ones(()))
        greedy(torch.zeros(1 + i, 2 + i, 2 + i, dtype=torch.int64), torch.ones(1 + i, dtype=torch.int64), 0.05 * i)
    assert set(variants().values()) == {1}, variants()


def every_form():
    for form in ("centred", "normalised"):
        before = len(DRY.variants(token_kernel))
        for size in (1, 2, 16, 32):
            token_loss(gk.LossConfig(), 64, 50, advantages=Advantages(torch.zeros(64), form, size, 1e-4 * size))
        assert len(DRY.variants(token_kernel)) == before + 1, form
    for form in FORMS.values():
        token_loss(gk.LossConfig(**form, kl_coef=0.1, kl_gradient="importance_weighted"), 3, 50)
    token_loss(gk.LossConfig(ratio_level="sequence"), 1, 50, cu_seqlens=torch.tensor([0, 20, 50]))
    for kl_coef in (0.0, 0.1, torch.tensor(0.1, dtype=torch.float64)):
        token_loss(gk.LossConfig(kl_coef=kl_coef), 3, 50, torch.float64)
    for baseline in BASELINES:
        for scale in SCALES:
            for ids in (None, torch.arange(8) // 3):
                one = torch.ones(8, dtype=torch.float64)
                samples = Samples(torch.zeros(8, 2), None, None, ids, one, one)
                backend.group_advantages(samples, AdvantageForm(4, baseline, scale, 1, 1e-4, 0.5, -9.0, 9.0, False))
    grid, cu = torch.zeros(1, 9), torch.tensor([0, 4, 9])
    backend.gae(grid, None, None, cu, 0.9, 1.0)
    backend.gae(grid, grid, torch.ones_like(grid, dtype=torch.bool), cu, 0.9, 1.0)
    for dtype in (torch.float32, torch.float16, torch.float64):
        for first in (0, 1):
            backend.scale(torch.zeros(2, 3, 64, dtype=dtype)[..., first:], torch.ones(()))


def no_spills_no_doubles_wide_accesses():
    for kernel in KERNELS:
        for compiled in DRY.variants(kernel):
            asm, needs, types = assembly(compiled), resources(compiled), compiled.src.signature.values()
            what = (kernel.__name__, needs, constants_of(compiled))
            assert needs.spilled == 0 and needs.shared <= SHARED_BYTES[ARCH], what
            if "*fp64" not in types:
                assert ".f64" not in asm and "_f64" not in asm, what
            if kernel is scale_kernel and "*fp64" not in types and constants_of(compiled)["ALIGNED"]:
                assert all(access in asm for access in WIDE[sys.argv[1]]), what


assert not launch.INTERPRETED
one_variant_for_all_shapes_and_numbers()
if ARCH in (90, "gfx942"):
    every_form()
no_spills_no_doubles_wide_accesses()
print(f"{sys.argv[1]} {ARCH}: {variants()}")

"""Compiles the Triton row kernels for a GPU that need not be here; `python dry_rows.py cuda 90`. Run by test_triton.py
in a process of its own."""

import sys
from collections import Counter

import torch
from forms import FORMS

import grpo_kernels as gk
from grpo_kernels.backends import triton as backend
from grpo_kernels.backends.triton import launch, tuning
from grpo_kernels.backends.triton.row import gradient_kernel, policy_kernel, stats_kernel
from grpo_kernels.inputs.layout import acc_dtype, layout_of, rows_of
from grpo_kernels.loss.policy import Advantages, LossArguments, policy_inputs
from dry_driver import SHARED_BYTES, WIDE, assembly, constants_of, dry_run, resources

KERNELS = (stats_kernel, gradient_kernel, policy_kernel)
PHASES = {"stats_kernel": 3, "gradient_kernel": 1, "policy_kernel": 2}  # row, segments, merge; -; row, merge
ARCH = int(sys.argv[2]) if sys.argv[1] == "cuda" else sys.argv[2]
DRY = dry_run(sys.argv[1], ARCH)


def arguments(dtype, batch, tokens, vocab, *, config=None, softcap=None, temperature=1.0, advantages=None):
    """Every row is the same one: no memory, and offsets past 2^32."""
    logits = torch.empty(1, 1, vocab, dtype=dtype).expand(batch, tokens, vocab)
    targets = torch.empty(1, 1, dtype=torch.int64).expand(batch, tokens)
    rows = rows_of(
        logits, targets, None, temperature=temperature, logit_scale=1.0, softcap=softcap, ignore_index=-100
    )  # fmt: skip
    real, per_token = acc_dtype(dtype), torch.empty(1, 1, dtype=acc_dtype(dtype)).expand(batch, tokens)
    inputs = policy_inputs(
        layout_of(targets.shape, None), rows.active, real, config or gk.LossConfig(kl_coef=0.1),
        advantages or Advantages(per_token), LossArguments(per_token, per_token, per_token),
    )  # fmt: skip
    return rows, inputs, per_token


def launch_all(*args, **options):
    rows, inputs, g = arguments(*args, **options)
    stats, _ = backend.row_forward(rows, False)
    backend.row_backward(rows, stats, g, g, rows.logits)
    backend.row_policy(rows, inputs, rows.logits)


def launched():
    grids = Counter(DRY.launches)
    DRY.launches.clear()
    return grids


def counts():
    return {k.__name__: len(DRY.variants(k)) for k in KERNELS}


def one_variant_for_all_lengths_and_numbers():
    for i in range(20):
        config = gk.LossConfig(kl_coef=0.01 * (i + 1), eps_low=0.1 + 0.01 * i, entropy_coef=0.01 * i)
        vocab, tokens = 128 * (1 + 97 * i), 1 + 997 * i
        launch_all(torch.bfloat16, 1000 + i, tokens, vocab, config=config, temperature=0.5 + 0.1 * i)
    assert set(counts().values()) == {1}, counts()
    for rows in (1, 3, 7):  # shared between programs
        launch_all(torch.bfloat16, rows, 1, 151936)
    assert counts() == PHASES, counts()


def one_variant_for_tensors_as_coefficients():
    before = len(DRY.variants(policy_kernel))
    for value in (0.0, 0.1):
        tensor = torch.tensor(value)
        launch_all(torch.bfloat16, 5000, 1, 4096, config=gk.LossConfig(kl_coef=tensor, entropy_coef=tensor))
    assert len(DRY.variants(policy_kernel)) == before + 1, counts()


def legal_grids_and_offsets():
    DRY.launches.clear()
    launch_all(torch.bfloat16, 1, 70_000, 151_936)  # 1e10 logits
    assert {grid[0] for _, grid in launched()} == {70_000}
    launch_all(torch.bfloat16, 1, 1, 151_936)
    segments = -(-151_936 // tuning.shape_for(torch.empty(0, dtype=torch.bfloat16)).SEGMENT)
    assert segments >= 5 and ("stats_kernel", (1, segments, 1)) in launched()
    assert counts() == PHASES, counts()


def every_dtype_alignment_and_form():
    for dtype, vocab in ((torch.float32, 50257), (torch.float16, 257), (torch.float64, 50257), (torch.bfloat16, 50257)):
        for rows in (1, 5000):
            launch_all(dtype, rows, 1, vocab, softcap=30.0 if dtype == torch.float32 else None)
    launch_all(torch.bfloat16, 5000, 1, 256_000, softcap=30.0)
    for form in ("centred", "normalised"):
        before = len(DRY.variants(policy_kernel))
        for size in (1, 2, 16, 500):
            advantages = Advantages(torch.zeros(5000), form, size, 1e-4 * size)
            rows, inputs, _ = arguments(torch.bfloat16, 5000, 3, 4096, advantages=advantages)
            backend.row_policy(rows, inputs, rows.logits)
        assert len(DRY.variants(policy_kernel)) == before + 1, form
    for name, form in FORMS.items():
        config = gk.LossConfig(**form, kl_coef=0.1, kl_gradient="behaviour_weighted")
        if config.form.token_local and ARCH in (90, "gfx942"):
            rows, inputs, _ = arguments(torch.bfloat16, 5000, 1, 4096, config=config)
            before = len(DRY.variants(policy_kernel))
            backend.row_policy(rows, inputs, rows.logits)
            assert len(DRY.variants(policy_kernel)) == before + 1, name


def candidates_with_few_registers():
    """The widest tiles of those that GRPO_KERNELS_TUNE tries with 128 registers per thread; others have more, or need less."""
    rows, inputs, _ = arguments(torch.bfloat16, 5000, 1, 151_936)
    stats = backend._new_stats(rows)
    for config in tuning.CANDIDATES:
        tight = tuning.shape_for(rows.logits, config).options["maxnreg"] == 128
        if tight and (config.steps, config.segment) == (4, 16384):
            backend._policy(rows, inputs, stats, rows.logits, config)


def no_spills_no_doubles_wide_accesses():
    for kernel in KERNELS:
        for compiled in DRY.variants(kernel):
            asm, needs, constants = assembly(compiled), resources(compiled), constants_of(compiled)
            what = (kernel.__name__, compiled.src.signature["logits"], constants)
            assert needs.spilled == 0, (needs, what)
            assert 0 < needs.registers <= (128 if sys.argv[1] == "cuda" else 168), (needs, what)  # two programs fit
            assert needs.shared <= 4096 <= SHARED_BYTES[ARCH], (needs, what)
            double = compiled.src.signature["logits"] == "*fp64"
            assert ((".f64" in asm) or ("_f64" in asm)) == double, what
            if constants["SWEEP"].ALIGNED and kernel is gradient_kernel and not double:
                assert all(access in asm for access in WIDE[sys.argv[1]]), what


assert not launch.INTERPRETED
one_variant_for_all_lengths_and_numbers()
legal_grids_and_offsets()
one_variant_for_tensors_as_coefficients()
if ARCH not in (86, 89, 120):  # those differ in shared memory from their neighbours, of which rows need little
    every_dtype_alignment_and_form()
if ARCH == 90:
    candidates_with_few_registers()
no_spills_no_doubles_wide_accesses()
worst = max((resources(c).registers, k.__name__) for k in KERNELS for c in DRY.variants(k))
print(f"{sys.argv[1]} {ARCH}: {sum(counts().values())} variants, at most {worst[0]} registers ({worst[1]})")

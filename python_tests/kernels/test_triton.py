"""What is specific to Triton in the row kernels: rows that are split or not, odd vocabularies, strides and offsets; and
variants, registers and accesses, compiled for GPUs that need not be present. test_triton_token.py: the token kernel."""

import math
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS_HERE, DTYPES, dtype_name
from dry_compile import check_compiled
from eager_logps import check, ours, run

import grpo_kernels as gk
from grpo_kernels.testing.inputs import make_batch

pytest.importorskip("triton")
if "triton" not in BACKENDS_HERE:
    pytest.skip("neither a GPU nor the interpreter", allow_module_level=True)

import triton

from grpo_kernels.backends.triton import launch, tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = [("cuda", "80"), ("cuda", "89"), ("cuda", "90"), ("cuda", "100"), ("cuda", "120"), ("hip", "gfx942")]
FULL = {"delta": 1.6, "dual_clip": 1.4, "kl_coef": 0.1, "entropy_coef": 0.05}


def row_wise(logits, targets, **options):
    return run(ours, logits.to(DEVICE), targets.to(DEVICE), backend="triton", **options)


# ---- accuracy, as test_logps.py tests it for the CPU kernels ----


@pytest.mark.parametrize("vocab", [1, 2, 31, 257, 2049, 5003])  # one lane, a tile and its neighbour, several segments
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_accuracy(dtype, vocab):
    """Three rows are split between programs, five are not."""
    torch.manual_seed(vocab)
    for rows in (3, 5):
        logits, targets = (3 * torch.randn(rows, vocab)).to(DEVICE, dtype), torch.randint(vocab, (rows,), device=DEVICE)
        check(logits, targets, f"{dtype} {rows} {vocab}", backend="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
def test_a_large_odd_vocabulary(dtype):
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(2, 50257)).to(DEVICE, dtype), torch.tensor([50256, 0], device=DEVICE)
    check(logits, targets, "50257", backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"logit_scale": 0.25, "temperature": 1.3}, {"softcap": 30.0}, {"softcap": 5.0, "logit_scale": 2.0, "temperature": 0.9}],
    ids=str,
)  # fmt: skip
def test_transforms(dtype, options):
    torch.manual_seed(1)
    logits, targets = (4 * torch.randn(4, 1031)).to(DEVICE, dtype), torch.randint(1031, (4,), device=DEVICE)
    check(logits, targets, str(options), backend="triton", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_peaked_rows(dtype):
    """One logit far above: 1 - p must not be formed from a rounded p, nor the target's gradient added to a stored one."""
    torch.manual_seed(2)
    logits, targets = torch.randn(6, 999), torch.randint(999, (6,))
    logits[torch.arange(6), targets] = torch.tensor([5.0, 8.0, 12.0, 16.0, 24.0, 40.0])
    check(logits.to(DEVICE, dtype), targets.to(DEVICE), "peaked", backend="triton")


@pytest.mark.parametrize("shift", [-1e4, -100.0, 1e4])
def test_shifted_logits_change_nothing(shift):
    torch.manual_seed(3)
    logits, targets = (torch.randn(4, 500) * 8).round() / 8, torch.randint(500, (4,))  # exact under the shift
    for a, b in zip(row_wise(logits, targets), row_wise(logits + shift, targets), strict=True):
        assert torch.equal(a, b)


def test_masked_vocabulary_and_extreme_logits():
    torch.manual_seed(4)
    logits, targets = torch.randn(5, 300), torch.tensor([1, 2, 4, 3, 0])
    logits[:, ::3] = -math.inf
    logits[4] = -math.inf  # no distribution: NaN, as torch
    logps, entropy, _, g = (x.cpu() for x in row_wise(logits, targets))
    exact = logits.double().log_softmax(-1)
    assert torch.equal(logps.isneginf(), torch.tensor([False, False, False, True, False]))
    assert logps[4].isnan() and entropy[4].isnan() and entropy[:4].isfinite().all()
    torch.testing.assert_close(logps[:3].double(), exact[torch.arange(3), targets[:3]], rtol=0, atol=1e-6)
    assert (g[:3, ::3] == 0).all() and g[:3].isfinite().all()
    extreme = torch.full((3, 70), -3.0e38)
    extreme[0, 5], extreme[1, 5], extreme[2, 5] = 3.0e38, -2.9e38, 0.0
    logps, entropy, *_ = row_wise(extreme, torch.full((3,), 5))
    assert (logps == 0).all() and (entropy == 0).all()


def test_tanh_against_float64():
    """The softcap's tanh, in both of its ranges and at the border between them."""
    x = torch.cat([torch.linspace(-60, 60, 4001), torch.logspace(-30, 1, 500)])[None]
    for dtype, limit in ((torch.float32, 4e-7), (torch.float64, 1e-15)):
        logits = x.to(DEVICE, dtype).requires_grad_()
        out = gk.token_logps(logits, torch.zeros(1, dtype=torch.int64, device=DEVICE), softcap=20.0, backend="triton")
        capped = 20 * torch.tanh(logits.detach().double() / 20)
        exact = capped.log_softmax(-1)[0, 0]
        assert abs(out.logps.item() - exact) <= limit * abs(exact)
        (g,) = torch.autograd.grad(out.logps.sum(), logits)
        expected = -(capped.softmax(-1) * (1 - (capped / 20) ** 2))
        torch.testing.assert_close(g[:, 1:].double(), expected[:, 1:], rtol=20 * limit, atol=limit)


# ---- a row's result depends on the row ----


def test_a_row_depends_on_nothing_but_the_row():
    """Bitwise: a row alone is split between programs; among others, one program has the entire row."""
    torch.manual_seed(5)
    logits, targets = torch.randn(6, 5003), torch.randint(5003, (6,))
    expected = row_wise(logits, targets)
    for i in (0, 3, 5):
        x, t = logits[i : i + 1].to(DEVICE), targets[i : i + 1].to(DEVICE)
        for a, b in zip(ours(x, t, backend="triton"), expected, strict=False):
            assert torch.equal(a, b[i : i + 1])


@pytest.mark.parametrize("tokens", [3, 5])  # split between programs, or not
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_one_pass_two_and_in_place_are_the_same_bits(dtype, tokens):
    b, config = make_batch(sequences=1, tokens=tokens, vocab=2500).to(dtype), gk.LossConfig(**FULL)
    b = type(b)(*(x.to(DEVICE) for x in b))
    b = b._replace(mask=torch.ones_like(b.mask), advantages=torch.full_like(b.advantages, 0.7))
    results = []
    for inplace in (False, True):
        for single_pass in (True, False):
            x = b.logits.clone().requires_grad_()
            out = gk.grpo_loss(
                x * 1, b.targets, b.advantages, b.mask, config=config, inplace=inplace, single_pass=single_pass,
                backend="triton", **b.keywords(),
            )  # fmt: skip
            results.append((out.loss.detach(), out.logps, *torch.autograd.grad(out.loss, x)))
    for other in results[1:]:
        assert all(torch.equal(a, c) for a, c in zip(results[0], other, strict=True))
    assert (results[0][-1] != 0).any(-1).all()


def test_rows_without_a_gradient_are_zeros_and_not_read():
    """The given gradient is zero, so that no NaN of the logits reaches the result."""
    for tokens in (2, 6):
        x = torch.full((1, tokens, 3000), math.nan, device=DEVICE, requires_grad=True)
        targets = torch.zeros(1, tokens, dtype=torch.int64, device=DEVICE)
        out = gk.token_logps(x, targets, backend="triton").logps
        (g,) = torch.autograd.grad(out, x, torch.zeros_like(out))
        assert out.isnan().all() and (g == 0).all()


# ---- strides and offsets ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_strides_are_arguments(dtype):
    torch.manual_seed(6)
    wide, targets = torch.randn(2, 4, 150).to(DEVICE, dtype), torch.randint(101, (2, 4), device=DEVICE)
    for view in (
        wide[..., 3:104],
        wide.transpose(0, 1)[..., 1:102].transpose(0, 1),
        wide[:1, :, 7:108].expand(2, 4, 101),
    ):
        a, b = (run(ours, x, targets, backend="triton") for x in (view, view.contiguous()))
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    per_token = torch.rand(2, 1, device=DEVICE).expand(2, 4) + 0.5
    a, b = (
        run(ours, wide[..., :101], targets, backend="triton", temperature=t) for t in (per_token, per_token.clone())
    )
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_one_position_more_is_ignored():
    torch.manual_seed(7)
    logits, targets = torch.randn(3, 5, 40), torch.randint(40, (3, 4))
    logits[:, -1] = math.nan
    x = logits.to(DEVICE).requires_grad_()
    out = gk.token_logps(x, targets.to(DEVICE), backend="triton")
    assert torch.equal(out.logps, gk.token_logps(x[:, :-1], targets.to(DEVICE), backend="triton").logps)
    (g,) = torch.autograd.grad(out.logps.sum(), x)
    assert (g[:, -1] == 0).all() and (g[:, :-1] != 0).any()


def test_offsets_past_32_bits():
    """Two rows 2^31 elements apart, in a storage of which nothing else is touched."""
    apart = 2**31 + 16
    rows = torch.empty(apart + 300, dtype=torch.float16, device=DEVICE).as_strided((2, 1, 300), (apart, 300, 1))
    rows.copy_(torch.randn(2, 1, 300))
    targets = torch.tensor([[3], [299]], device=DEVICE)
    a, b = (gk.token_logps(x, targets, backend="triton").logps for x in (rows, rows.contiguous()))
    assert torch.equal(a, b)


def test_a_target_outside_the_vocabulary_is_nan():
    """ops/loss.py refuses it on the CPU and cannot check it on a GPU."""
    from grpo_kernels.backends import triton as backend
    from grpo_kernels.inputs.layout import rows_of

    x, targets = torch.randn(1, 3, 50, device=DEVICE), torch.tensor([[-3, 50, 2**40]], device=DEVICE)
    rows = rows_of(x, targets, None, temperature=1.0, logit_scale=1.0, softcap=None, ignore_index=-100)
    stats, _ = backend.row_forward(rows, False)
    assert stats.logps.isnan().all() and stats.entropy.isfinite().all()


@pytest.mark.parametrize("inplace", [False, True])
def test_torch_compile_sees_one_graph(inplace):
    b, config = make_batch(sequences=3, tokens=4, vocab=50), gk.LossConfig(**FULL)
    b = type(b)(*(x.to(DEVICE) for x in b))

    def step(x):
        options = {"config": config, "inplace": inplace, "backend": "triton", **b.keywords()}
        return gk.grpo_loss(x * 1.0, b.targets, b.advantages, b.mask, **options).loss

    torch._dynamo.reset()
    x = b.logits.clone().requires_grad_()
    eager, compiled = step(x), torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(eager, compiled)
    assert torch.equal(torch.autograd.grad(eager, x)[0], torch.autograd.grad(compiled, x)[0])


# ---- launches ----


def test_scalars_travel_as_bits():
    for dtype, values in ((torch.float32, (0.7, -1.5, 0.0)), (torch.float64, (0.7, 1e-300, 0.0))):
        for value in values:
            word = torch.tensor(launch.scalar_bits(value, dtype), dtype=torch.int64)
            narrow = word if dtype == torch.float64 else word.to(torch.int32)
            assert narrow.view(dtype).item() == torch.tensor(value, dtype=dtype).item()


def test_alignment_is_of_every_row():
    x = torch.empty(2, 3, 64, dtype=torch.bfloat16)
    assert launch.aligned(x) and launch.aligned(x[:, :, :32]) and launch.aligned(x[:1, :1].expand(2, 3, 64))
    assert not launch.aligned(x[..., 1:33]) and not launch.aligned(x[..., :30]) and not launch.aligned(x, x[..., 8:20])
    assert not launch.aligned(torch.empty(2, 3, 50257, dtype=torch.bfloat16))


def test_scaling_uses_vectors_although_rows_are_no_multiple_of_them():
    from grpo_kernels.backends.triton.scale import rows_begin_aligned, rows_without_gaps

    odd, padded = torch.empty(2, 3, 50257, dtype=torch.bfloat16), torch.empty(2, 3, 64, dtype=torch.bfloat16)
    assert rows_without_gaps(odd).shape == (1, 1, odd.numel()) and rows_begin_aligned(rows_without_gaps(odd))
    for view in (padded[..., :37], padded[:, :1], padded[:, ::2]):
        assert rows_without_gaps(view) is view and rows_begin_aligned(view)
    assert not rows_begin_aligned(odd) and not rows_begin_aligned(padded[..., 1:])
    assert not rows_begin_aligned(rows_without_gaps(odd.view(-1)[1:].view(1, 1, -1)))


def test_newer_architectures_use_the_latest_entry_of_the_table():
    table = tuning.TABLE
    assert tuning.config_of("cuda", 80) == tuning.config_of("cuda", 89) == table["cuda", 80]
    assert tuning.config_of("cuda", 90) == table["cuda", 90]
    assert tuning.config_of("cuda", 120) == table["cuda", 100] and tuning.config_of("hip", 0) == table["hip", 0]
    with pytest.raises(RuntimeError, match="no launch configuration for 'xpu'"):
        tuning.config_of("xpu", 1)


def test_shapes_follow_the_element_and_few_rows_are_split():
    hardware = tuning.Hardware("cuda", 90, 32, 132)
    config = tuning.Config(warps=8, programs=2, steps=4, segment=16384, split_below=4)
    half, single = (tuning.shape_of(config, hardware, size) for size in (2, 4))
    assert (half.LANES, single.LANES, half.tile) == (2048, 1024, 8192)  # 16 bytes per thread either way
    assert half.options == {"num_warps": 8, "maxnreg": 128}
    assert half.splits(527, 151_936) and not half.splits(528, 151_936) and not half.splits(1, 16384)
    wide = tuning.shape_of(config._replace(warps=16, steps=8), hardware, 2)
    assert wide.SEGMENT == wide.tile == 32768  # at least a tile
    alone = tuning.shape_of(config._replace(warps=16, programs=1), hardware, 2)
    assert alone.options == {"num_warps": 16, "maxnreg": 128}  # all registers of a multiprocessor


def test_tuning_takes_the_fastest_that_fits():
    slow, fast, too_large = (tuning.Config(w, 2, 4, 16384, 4) for w in (4, 8, 32))
    milliseconds, timed = {slow: 2.0, fast: 1.0}, []

    def launch_with(config):
        if config == too_large:
            raise triton.runtime.errors.OutOfResources(300, 200, "shared memory")
        timed.append(config)

    def timer(call):
        call()
        return milliseconds[timed[-1]]

    best, times = tuning.fastest([slow, too_large, fast], launch_with, timer)
    assert best == fast and times == milliseconds
    with pytest.raises(RuntimeError, match="none of 1 launch configurations"):
        tuning.fastest([too_large], launch_with, timer)


def test_tuning_writes_copies_and_prints_a_row(monkeypatch, capsys):
    """As on a GPU: timed launches write into a copy, once per kernel, dtype and vocabulary; the loss is the same."""
    b, config = make_batch(sequences=2, tokens=3, vocab=40), gk.LossConfig(**FULL)
    b = type(b)(*(x.to(DEVICE) for x in b))

    def gradient():
        x = b.logits.clone().requires_grad_()
        out = gk.grpo_loss(
            x * 1, b.targets, b.advantages, b.mask, config=config, inplace=True, backend="triton", **b.keywords()
        )
        return torch.autograd.grad(out.loss, x)[0]

    plain = gradient()
    monkeypatch.setattr(tuning, "asked", lambda: True)
    monkeypatch.setattr(tuning, "_hardware", lambda _: tuning.Hardware("cuda", 90, 32, 132))
    monkeypatch.setattr(tuning, "CANDIDATES", tuning.CANDIDATES[:2])
    monkeypatch.setattr(tuning, "_tuned", set())
    monkeypatch.setattr(triton.testing, "do_bench", lambda call: call() or 1.0)
    assert torch.equal(gradient(), plain) and torch.equal(gradient(), plain)
    said = capsys.readouterr().err
    assert said.count("row_policy") == 1 and "('cuda', 90): Config(warps=" in said


# ---- compiled for GPUs that need not be present ----


@pytest.mark.parametrize("target", TARGETS, ids="-".join)
def test_compiled(target):
    """dry_rows.py: variants, grids, offsets, spills, registers, shared memory, doubles, widths of accesses."""
    check_compiled(Path(__file__).with_name("dry_rows.py"), target)

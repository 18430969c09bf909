"""The operators under torch.compile: opcheck, one graph, no recompilation for lengths and annealed coefficients."""

import pytest
import torch
from forms import FORMS
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import grpo_kernels as gk
from grpo_kernels.inputs.layout import acc_dtype, layout_of, rows_of
from grpo_kernels.loss.policy import Advantages, LossArguments, policy_inputs
from grpo_kernels.ops import loss as ops
from grpo_kernels.testing.inputs import make_batch

FULL = {"kl_coef": 0.1, "entropy_coef": 0.05}


def arguments(dtype=torch.float32, level="token"):
    """Rows, policy inputs and row statistics of one batch."""
    b = make_batch().to(dtype)
    rows = rows_of(b.logits, b.targets, b.mask, temperature=0.7, logit_scale=1.0, softcap=20.0, ignore_index=-100)
    layout = layout_of(b.targets.shape, None)
    inputs = policy_inputs(
        layout, rows.active, acc_dtype(dtype), gk.LossConfig(ratio_level=level, **FULL),
        Advantages(b.advantages), LossArguments(**b.keywords()),
    )  # fmt: skip
    *stats, _ = ops.row_forward(*rows, False, False, "cpu")
    return rows, list(inputs), stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    rows, inputs, stats = arguments(dtype)
    g = torch.randn_like(stats[0])
    weight, bias = torch.randn(50, 133).to(dtype), torch.randn(50).to(dtype)
    rows_50 = rows._replace(targets=rows.targets % 50)
    lora_a, lora_b = torch.randn(2, 133).to(dtype), torch.randn(50, 2).to(dtype)
    head, adapted = (weight, bias, None, None, 1.0, 4), (weight, None, lora_a, lora_b, 0.5, 4)
    cases = {
        ops.row_forward: (*rows, True, False, "cpu"),
        ops.row_backward: (*rows, *stats, g, g, "cpu"),
        ops.row_backward_: (rows.logits.clone(), *rows[1:], *stats, g, None, "cpu"),
        ops.row_policy: (*rows, *inputs, False, "cpu"),
        ops.row_policy_: (rows.logits.clone(), *rows[1:], *inputs, False, "cpu"),
        ops.token_policy: (stats[0], stats[1], rows.active, None, *inputs, "cpu"),
    }  # fmt: skip
    for op, args in cases.items():
        torch.library.opcheck(op, args)
    for lm_head, needs in ((head, [True, False, True, False, False]), (adapted, [True, False, False, True, True])):
        torch.library.opcheck(ops.linear_forward, (*rows_50, *lm_head, [True, True, False], False, "cpu"))
        torch.library.opcheck(ops.linear_backward, (*rows_50, *lm_head, needs, *stats, g, g, "cpu"))
        torch.library.opcheck(ops.linear_policy, (*rows_50, *lm_head, needs, *inputs, False, "cpu"))


VIEWS = {  # logits [5, 7, 133]
    "of_fewer_tokens": lambda dtype: torch.randn(5, 8, 133).to(dtype)[:, :-1],
    "not_from_the_first": lambda dtype: torch.randn(5, 9, 133).to(dtype)[:, 1:-1],
    "of_a_padded_vocabulary": lambda dtype: torch.randn(5, 7, 139).to(dtype)[..., :133],
    "tokens_first": lambda dtype: torch.randn(7, 5, 133).to(dtype).transpose(0, 1),
    "expanded": lambda dtype: torch.randn(1, 7, 133).to(dtype).expand(5, -1, -1),
}


def each_row(matrix):
    return [row for sequence in matrix for row in sequence]  # views: flatten would copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", VIEWS)
def test_a_gradient_is_aligned_as_its_logits_are(backend, view, dtype):
    """Each row's address modulo 16 is the same, so that a kernel that loads vectors can store vectors."""
    b, x = make_batch(), VIEWS[view](dtype).requires_grad_()
    dense = gk.grpo_loss(x.contiguous(), b.targets, b.advantages, b.mask, backend="reference").loss
    (expected,) = torch.autograd.grad(dense, x)
    for single_pass in (True, False):
        loss = gk.grpo_loss(x, b.targets, b.advantages, b.mask, single_pass=single_pass, backend=backend).loss
        (gradient,) = torch.autograd.grad(loss, x)
        shifts = {(g.data_ptr() - z.data_ptr()) % 16 for g, z in zip(each_row(gradient), each_row(x), strict=True)}
        assert shifts == {0} and gradient.stride(2) == 1
        assert gradient.untyped_storage().nbytes() < gradient.nbytes + 16 * (5 * 7 + 5 + 1)
        torch.testing.assert_close(gradient, expected, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_a_graph_knows_how_a_gradient_is_aligned(view):
    rows, inputs, stats = arguments()
    rows = rows._replace(logits=VIEWS[view](torch.float32))
    for op, args in {
        ops.row_backward: (*rows, *stats, stats[0], None, "cpu"),
        ops.row_policy: (*rows, *inputs, False, "cpu"),
    }.items():
        torch.library.opcheck(op, args, test_utils="test_faketensor")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("form", ["token", "sequence", "gmpo", "vespo", "dppo_kl", "ipo", "clip_cov", "kl_cov"])
def test_compiled_is_eager(form, inplace):
    b, config = make_batch(), gk.LossConfig(**FORMS[form], **FULL)

    def step(x, scale):
        out = gk.grpo_loss(x * 1.0, b.targets, b.advantages, b.mask, config=config, inplace=inplace, **b.keywords())
        return out.loss * scale, out.metrics["kl"]

    torch._dynamo.reset()
    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = b.logits.clone().requires_grad_()
        loss, kl = fn(x, 0.5)
        results.append((loss.detach(), kl, *torch.autograd.grad(loss, x)))
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-15)


def test_compiled_linear_with_inductor():
    b, config = make_batch(), gk.LossConfig(**FULL)

    def step(h, w):
        return gk.linear_grpo_loss(h, w, b.targets, b.advantages, b.mask, config=config, **b.keywords()).loss

    torch.manual_seed(0)
    h, w = (
        torch.randn(5, 7, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(133, 8, dtype=torch.float64, requires_grad=True),
    )
    for a, c in zip(
        torch.autograd.grad(torch.compile(step, fullgraph=True)(h, w), (h, w)),
        torch.autograd.grad(step(h, w), (h, w)),
        strict=True,
    ):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-15)


def test_one_graph_for_all_lengths_and_coefficients(backend):
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(x, targets, advantages, mask, old, ref, config):
        others = {"old_logps": old, "ref_logps": ref, "config": config, "backend": backend}
        return gk.grpo_loss(x, targets, advantages, mask, **others).loss

    for i, tokens in enumerate((7, 12, 33, 64)):
        b = make_batch(sequences=4 + i, tokens=tokens, vocab=50)
        config = gk.LossConfig(kl_coef=0.1 / (i + 1), eps_low=0.2 - 0.01 * i, entropy_coef=0.0)
        args = (b.logits, b.targets, b.advantages, b.mask)
        others = {"old_logps": b.old_logps, "ref_logps": b.ref_logps, "config": config}
        eager = gk.grpo_loss(*args, **others, backend=backend).loss
        torch.testing.assert_close(step(*args, *others.values()), eager, rtol=1e-12, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("changing", ["scale", "temperature", "denominator"])
def test_one_graph_for_all_numbers(changing):
    """The first number is a constant of its graph; the second graph takes any other."""
    torch._dynamo.reset()  # its limit on graphs is one function's, of all the tests together
    counter = CompileCounterWithBackend("aot_eager")
    b = make_batch().to(torch.float32)
    head = b.logits[0].contiguous()

    def both(x, number):
        args = (b.targets, b.advantages, b.mask)
        k = {changing: number}
        return gk.grpo_loss(x, *args, **k).loss, gk.linear_grpo_loss(x, head, args[0] % 7, *args[1:], **k).loss

    compiled = torch.compile(both, fullgraph=True, backend=counter)
    for number in (0.7, 0.9, 1.3, 2.0, 1.0, 0.4):
        found, wanted = [], []
        for f, into in ((compiled, found), (both, wanted)):
            x = b.logits.clone().requires_grad_()
            losses = f(x, number)
            into += [*losses, *torch.autograd.grad(sum(losses), x)]
        for a, c in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-8)
    # Not six. A temperature of 1 has a graph of its own, as none at all is faster.
    assert counter.frame_count <= (4 if changing == "temperature" else 2)


def test_one_graph_for_all_group_sizes(backend):
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(x, targets, mask, rewards, size):
        return gk.grpo_loss(x, targets, mask=mask, rewards=rewards, group_size=size, backend=backend).loss

    for groups, size in ((2, 3), (3, 2), (2, 5)):
        b = make_batch(sequences=groups * size, tokens=4, vocab=50)
        args = (b.logits, b.targets)
        eager = gk.grpo_loss(*args, mask=b.mask, rewards=b.advantages, group_size=size, backend=backend).loss
        torch.testing.assert_close(step(*args, b.mask, b.advantages, size), eager, rtol=1e-12, atol=0)
    assert counter.frame_count == 1


def test_import_does_no_work():
    """No compilation, no device query, no output, and no import other than torch."""
    import subprocess
    import sys

    code = (
        "import sys, grpo_kernels, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "extra = {'triton', 'transformers', 'rich', 'typer', 'matplotlib', 'psutil'} & set(sys.modules)\n"
        "import torch.utils; assert not {'rich', 'typer', 'matplotlib'} & extra, extra\n"
        "assert 'grpo_kernels.backends._cpu' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "", done.stderr

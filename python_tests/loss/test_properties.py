"""Properties that hold for every input, searched by hypothesis."""

import torch
from forms import FORMS
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_kernels as gk
from grpo_kernels.testing.inputs import make_batch

shapes = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 200))
seeds = st.integers(0, 2**31)
forms = st.sampled_from(list(FORMS.values()))
# kl_cov selects the tokens of highest covariance, and among equal ones the first.
untied = st.sampled_from([form for name, form in FORMS.items() if name != "kl_cov"])
# Forms whose only term is the policy term.
proportional = st.sampled_from([f for name, f in FORMS.items() if name not in ("tv_mask", "ipo", "dro", "kl_cov")])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
quick = settings(max_examples=40, deadline=None)


def batch_of(shape, seed):
    sequences, tokens, vocab = shape
    return make_batch(sequences, tokens, vocab, seed=seed)


def loss_and_gradient(b, config, logits=None, **options):
    x = (b.logits if logits is None else logits).detach().clone().requires_grad_()
    out = gk.grpo_loss(x, b.targets, b.advantages, b.mask, config=config, **b.keywords(), **options)
    return out.loss.detach(), torch.autograd.grad(out.loss, x)[0]


@quick
@given(shapes, seeds, st.integers(-4000, 4000))
def test_adding_a_constant_to_a_row_changes_nothing(shape, seed, constant):
    b = batch_of(shape, seed)
    logits = (b.logits.float() * 16).round() / 16  # so that the shifted ones are exact
    plain, shifted = (gk.token_logps(x, b.targets, return_entropy=True) for x in (logits, logits + constant))
    assert torch.equal(plain.logps, shifted.logps) and torch.equal(plain.entropy, shifted.entropy)


@quick
@given(shapes, seeds, dtypes)
def test_log_probs_are_never_positive_and_entropy_in_range(shape, seed, dtype):
    b = batch_of(shape, seed)
    out = gk.token_logps((20 * b.logits).to(dtype), b.targets, return_entropy=True, return_sum_p2=True)
    assert (out.logps <= 0).all() and (out.entropy >= -1e-6).all()
    assert (out.entropy <= torch.tensor(float(shape[2])).log() + 1e-5).all()
    assert ((out.sum_p2 > 0) & (out.sum_p2 <= 1 + 1e-5)).all()


@quick
@given(shapes, seeds, untied)
def test_permuting_sequences_permutes_the_gradient(shape, seed, form):
    b, config = batch_of(shape, seed), gk.LossConfig(**form, aggregation="sequence_mean", kl_coef=0.1)
    p = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    loss, g = loss_and_gradient(b, config)
    again, permuted = loss_and_gradient(type(b)(*(x[p] for x in b)), config)
    torch.testing.assert_close(loss, again, rtol=1e-12, atol=1e-14)
    assert torch.equal(g[p], permuted)


@quick
@given(shapes, seeds, untied)
def test_a_masked_token_is_a_removed_token(shape, seed, form):
    """The batch has the same loss when it is packed without its masked tokens."""
    b, config = batch_of(shape, seed), gk.LossConfig(**form, aggregation="sequence_mean", kl_coef=0.1)
    cu = torch.nn.functional.pad(b.mask.sum(-1).cumsum(0), (1, 0))
    kept = {k: v[b.mask] for k, v in b.keywords().items()}
    expected, g = loss_and_gradient(b, config)
    x = b.logits[b.mask].requires_grad_()
    advantages = b.advantages[:, None].expand_as(b.mask)[b.mask]
    out = gk.grpo_loss(x, b.targets[b.mask], advantages, cu_seqlens=cu, config=config, **kept)
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(out.loss, x)[0], g[b.mask], rtol=1e-12, atol=1e-14)


@quick
@given(shapes, seeds, proportional)
def test_zero_advantage_has_zero_gradient(shape, seed, form):
    b = batch_of(shape, seed)
    loss, g = loss_and_gradient(b._replace(advantages=torch.zeros_like(b.advantages)), gk.LossConfig(**form))
    assert loss == 0 and (g == 0).all()


@quick
@given(shapes, seeds)
def test_on_policy_gradient_is_minus_weight_times_advantage(shape, seed):
    b = batch_of(shape, seed)
    x = gk.token_logps(b.logits, b.targets).logps.requires_grad_()
    out = gk.policy_loss(x, b.advantages, b.mask, old_logps=x.detach())
    (g,) = torch.autograd.grad(out.loss, x)
    n = b.mask.sum().clamp(min=1)
    torch.testing.assert_close(g, torch.where(b.mask, -b.advantages[:, None] / n, 0.0), rtol=1e-12, atol=0)


@quick
@given(shapes, seeds, forms)
def test_gradients_of_a_row_sum_to_zero(shape, seed, form):
    """Softmax ignores an added constant, so the gradient has no component along it."""
    _, g = loss_and_gradient(batch_of(shape, seed), gk.LossConfig(**form, kl_coef=0.1, entropy_coef=0.05))
    torch.testing.assert_close(g.sum(-1), torch.zeros(g.shape[:-1], dtype=g.dtype), rtol=0, atol=1e-13)


@quick
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=64), st.integers(1, 8))
def test_group_advantages_are_standardised(values, groups):
    rewards = torch.tensor(values * groups, dtype=torch.float64)
    out = gk.group_advantages(rewards, group_size=len(values), eps=0.0)
    for i, a in enumerate(out.advantages.view(groups, -1)):
        if out.informative[i * len(values)]:
            assert abs(a.mean()) < 1e-6 and abs(a.std() - 1) < 1e-6
        else:
            assert (a == 0).all()

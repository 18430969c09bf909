"""A loss's metrics by name and stacked; those of micro-batches and ranks together, compared with the whole batch's."""

import copy
import pickle

import pytest
import torch
from forms import FORMS

import grpo_kernels as gk
from grpo_kernels.config import METRICS
from grpo_kernels.testing.inputs import make_batch

# A part's own tokens decide what these two do: they are not the whole's restricted to it.
SPLITTABLE = {name: form for name, form in FORMS.items() if form.get("objective") not in ("clip_cov", "kl_cov")}


def losses(form, parts):
    """The loss of some sequences each, with the whole batch's denominator."""
    torch.manual_seed(0)
    b, config = make_batch(sequences=6), gk.LossConfig(**{**form, "kl_coef": 0.1, "entropy_coef": 0.05})
    token_weights = torch.rand(b.mask.shape, dtype=torch.float64).round(decimals=1)
    logps = gk.token_logps(b.logits, b.targets, return_entropy=True)
    found = []
    for part in parts:
        keywords = {name: x[part] for name, x in {**b.keywords(), "token_weights": token_weights}.items()}
        found.append(
            gk.policy_loss(
                logps.logps[part], b.advantages[part], b.mask[part], **keywords, entropy=logps.entropy[part],
                denominator=7.0, config=config,
            ).metrics
        )  # fmt: skip
    return found


@pytest.mark.parametrize("form", SPLITTABLE.values(), ids=SPLITTABLE)
def test_parts_combine_to_the_whole(form):
    parts = [slice(0, 1), slice(1, 1), slice(1, 4), slice(4, 6)]  # one of them without tokens
    (whole,) = losses(form, [slice(0, 6)])
    combined = gk.combine_metrics(losses(form, parts))
    for name in METRICS:
        torch.testing.assert_close(
            combined[name], whole[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_without_tokens_it_is_a_loss_without_tokens():
    (empty,) = losses({}, [slice(0, 0)])
    combined = gk.combine_metrics([empty, empty])
    assert combined.floats() == empty.floats()


def test_what_a_part_without_tokens_reports_is_not_looked_at():
    part, empty = losses({}, [slice(0, 6), slice(0, 0)])
    empty.stacked[4:] = float("nan")  # after the losses and the number of tokens
    assert gk.combine_metrics([empty, part]).floats() == pytest.approx(part.floats(), rel=1e-12)


def test_by_name_stacked_and_as_numbers():
    (m,) = losses({}, [slice(0, 6)])
    assert list(m) == list(METRICS) and len(m) == len(METRICS) and "kl" in m and "nonsense" not in m
    assert m.stacked.shape == (len(METRICS),)
    assert m["kl"].dim() == 0 and m["kl"].data_ptr() == m.stacked[METRICS.index("kl")].data_ptr()
    assert m.floats() == {name: value.item() for name, value in m.items()}
    with pytest.raises(KeyError, match="nonsense"):
        m["nonsense"]
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert twin.floats() == m.floats() and twin.stacked.data_ptr() != m.stacked.data_ptr()


def test_a_mean_over_ranks_is_not_one_over_micro_batches():
    a, b = losses({}, [slice(0, 3), slice(3, 6)])
    both = gk.combine_metrics([a, b])
    assert both["policy_loss"] == a["policy_loss"] + b["policy_loss"]
    torch.testing.assert_close(gk.combine_metrics([a, b], losses="mean").stacked, both.stacked)  # one rank


def test_wrong_arguments():
    with pytest.raises(ValueError, match="at least one loss's metrics"):
        gk.combine_metrics([])
    (m,) = losses({}, [slice(0, 6)])
    with pytest.raises(ValueError, match="losses must be one of 'sum', 'mean'; got 'max'"):
        gk.combine_metrics(m, losses="max")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_details_are_what_the_metrics_are_means_of(form, packed):
    b = make_batch()
    config = gk.LossConfig(**{**form, "kl_coef": 0.1, "entropy_coef": 0.05})
    logps = gk.token_logps(b.logits, b.targets, return_entropy=True)
    tensors = {"logps": logps.logps, "advantages": b.advantages[:, None].expand(b.mask.shape), "mask": b.mask}
    tensors |= {name: x for name, x in b.keywords().items() if name != "ref_logps"}
    others = {"ref_logps": b.ref_logps, "entropy": logps.entropy}
    options = {"config": config}
    if packed:
        tensors, others = ({n: x.flatten() for n, x in of.items()} for of in (tensors, others))
        options["cu_seqlens"] = torch.arange(len(b.mask) + 1) * b.mask.shape[1]
    torch.manual_seed(3)  # of clip_cov's random picks
    m = gk.policy_loss(**tensors, **others, **options).metrics
    torch.manual_seed(3)
    d = gk.token_details(**tensors, **options)
    active = tensors["mask"] != 0
    assert all(x.shape == active.shape for x in d)
    means = {
        "ratio_mean": d.ratio, "clip_low": d.clip_low, "clip_high": d.clip_high, "clip_cap": d.clip_cap,
        "gradient_weight": d.gradient_weight, "weight_mean": d.weight, "rejected": d.weight == 0,
    }  # fmt: skip
    for name, x in means.items():
        torch.testing.assert_close(x[active].double().mean(), m[name], rtol=1e-9, atol=1e-12)
    assert d.ratio[active].max() == m["ratio_max"] or abs(d.ratio[active].max() / m["ratio_max"] - 1) < 1e-12
    for x in (d.ratio, d.gradient_weight, d.weight):
        assert (x[~active] == 1).all()
    assert not any(flag[~active].any() for flag in (d.clip_low, d.clip_high, d.clip_cap))


def test_details_of_a_sequence_level_ratio_count_sequences():
    b, config = make_batch(), gk.LossConfig(ratio_level="sequence", eps_low=0.01, eps_high=0.01)
    logps = gk.token_logps(b.logits, b.targets).logps
    d = gk.token_details(logps, b.advantages, b.mask, old_logps=b.old_logps, config=config)
    x = torch.where(b.mask, logps - b.old_logps, 0.0).sum(-1) / b.mask.sum(-1)
    clipped = ((x.exp() > 1.01) & (b.advantages > 0))[b.mask.any(-1)]
    assert 0 < clipped.sum() < len(clipped)
    assert (d.clip_high & b.mask).any(-1)[b.mask.any(-1)].tolist() == clipped.tolist()


def test_details_read_nothing_of_masked_tokens_and_keep_no_graph():
    b = make_batch()
    logps = gk.token_logps(b.logits, b.targets).logps.requires_grad_()
    clean = gk.token_details(logps, b.advantages, b.mask, old_logps=b.old_logps)
    holed = torch.where(b.mask, logps.detach(), float("nan"))
    again = gk.token_details(holed, b.advantages, b.mask, old_logps=torch.where(b.mask, b.old_logps, float("nan")))
    assert all(torch.equal(x, y) for x, y in zip(clean, again, strict=True))
    assert not any(x.requires_grad for x in clean)

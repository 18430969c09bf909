"""Every form of the loss, for tests of all forms: objectives with bounds that a batch reaches, and ratio levels."""

from grpo_kernels.config import RATIO_LEVELS

OBJECTIVES = {
    "cispo": {"cispo_low": 0.9, "cispo_high": 1.1},
    "sapo": {"sapo_tau_pos": 1.5, "sapo_tau_neg": 3.0},
    "gmpo": {"eps_low": 0.1, "eps_high": 0.05},
    "vespo": {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5},
    "reinforce": {},
    "dppo_tv": {"eps_low": 0.001, "eps_high": 0.002, "ratio_cap": 1.2},
    "dppo_kl": {"eps_low": 0.0001, "eps_high": 0.0002, "ratio_cap": 1.2},
    "tv_mask": {"tv_low": 0.001, "tv_high": 0.002, "ratio_sq_coef": 0.1},
    "ipo": {"tv_high": 0.002, "ratio_sq_coef": 0.1},
    "dro": {"dro_beta": 0.3},
    # All tokens are within the bounds, so that nothing is random.
    "clip_cov": {"cov_ratio": 1.0, "cov_low": -0.3, "cov_high": 0.2, "eps_high": 0.3, "delta": 1.5},
    "kl_cov": {"cov_ratio": 0.3, "cov_kl": 0.4},
}
OBJECTIVES = {name: {"objective": name, **options} for name, options in OBJECTIVES.items()}
FORMS = {**{level: {"ratio_level": level} for level in RATIO_LEVELS}, **OBJECTIVES}
COMPARED = {"kl_coef": 0.1, "entropy_coef": 0.05}


def with_everything(form):
    """Adds KL, entropy, and the caps that the objective uses."""
    return {**form, **COMPARED, **({} if "objective" in form else {"delta": 1.6, "dual_clip": 1.4})}

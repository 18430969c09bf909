"""What a loss is weighed by, from rewards: `group` (group_advantages), `estimators` (per sample: pass@k, GDPO, GPG,
process supervision), `returns` (per token: GAE, REINFORCE++, ReMax), `token_baselines`, `critic` (value loss,
whitening), `diversity` (near-duplicates). `operators` registers the kernels."""

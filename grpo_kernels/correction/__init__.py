"""Sampler against trainer: `config` (weights, filters, the trainers' presets), `rollout` (rollout_correction)."""

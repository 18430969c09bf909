"""Losses and log-probs: the public functions and their autograd."""

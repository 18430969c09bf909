"""The specification, in plain torch: what every kernel must compute. One module a subject: `loss` (log-probs, ratios,
KL and the loss, differentiated by autograd), `objectives` (its policy terms), `advantages`, `diversity`."""

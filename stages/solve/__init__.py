"""Training and judging: the solver, ranks, metrics, pruning, probes, networks end to end."""

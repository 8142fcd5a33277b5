"""The pipeline decides: what to do, in which order, from which levels; and does it."""

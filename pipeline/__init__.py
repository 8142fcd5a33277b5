"""The pipeline decides: what to train, what is missing, what it costs, in which order."""

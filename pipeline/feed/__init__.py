"""Levels to batches on the device: which tier, which order, how rows are gathered and copied."""

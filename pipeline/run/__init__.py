"""What a run has on disk, and a run at work: records, levels by name, the store, the session."""

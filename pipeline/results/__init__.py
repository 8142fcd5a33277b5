"""What a run gives: status, report, figures, exported networks, the paper's tables."""

"""One auxiliary problem is solved: epochs, checkpoints, scales, compression, evaluation."""

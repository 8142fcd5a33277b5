"""The commands: flags in, an answer out. Without torch where there is nothing to compute."""

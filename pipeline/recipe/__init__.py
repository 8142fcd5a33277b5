"""What to train: a recipe in strict TOML, the network it names, its augmentation, its variants."""

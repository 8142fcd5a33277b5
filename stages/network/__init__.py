"""Layers and auxiliary classifiers: the paper's, or blocks of any network; their arithmetic."""

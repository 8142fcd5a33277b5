"""Labelled images: where they come from, how they are decoded, how a view of one is drawn."""

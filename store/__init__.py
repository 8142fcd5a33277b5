"""The store remembers: levels on disk, what proves them complete, and the order they are read in.

Imports numpy and zarr only: no torch, and nothing of the floors above.
"""

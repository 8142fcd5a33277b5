"""Levels written by Dask workers: they are started, given tasks, and believed by digest."""

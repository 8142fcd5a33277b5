"""The same work done by Dask workers: they are started, given tasks, and believed by digest."""

"""x_0 and x_j are written: images read, layers applied, shards published."""

"""A level being written: shards, receipts, the commit, what is left after a crash, repair."""

"""A store in a bucket: objects in the place of files, leases, local copies of shards."""

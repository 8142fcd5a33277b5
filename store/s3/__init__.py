"""A store in a bucket: objects in the place of files, local copies of shards."""

"""What a level is on disk: its name, geometry, codec, shards, receipts, commit and checksums."""

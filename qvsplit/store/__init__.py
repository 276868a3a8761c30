"""The store: shards on disk, what is in them, and who may write."""

"""Extraction on a cluster: the stages as a Ray Data job, of which the driver commits the shards."""

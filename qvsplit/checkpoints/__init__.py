"""Where a checkpoint's tensors lie, which family it is of, and its fingerprints."""

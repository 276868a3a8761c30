"""What tests share: checkpoints, photographs, fakes, fuzzers, killers."""

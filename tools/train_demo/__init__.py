"""How the demo checkpoint in `qvsplit/demo/` was made: drawn postcards, questions about them, and the training."""

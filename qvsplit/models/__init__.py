"""The vision encoder, the language model, and the prompt between them."""

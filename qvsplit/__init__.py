"""Two halves of a Qwen2-VL checkpoint."""

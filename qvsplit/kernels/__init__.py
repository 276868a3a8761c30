"""Fast forward passes and attention; torch alone."""

"""One extraction: plan, stages, runner."""

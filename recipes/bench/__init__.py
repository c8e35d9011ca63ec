"""Time and memory of the step."""

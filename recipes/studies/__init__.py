"""Questions about the optimizer that no training run answers."""

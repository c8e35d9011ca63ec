"""Step time and memory of optimizers on the shapes of well-known models, built without their weights."""

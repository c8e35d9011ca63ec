"""Image classifiers from scratch."""

"""Language models from scratch, and full fine-tuning."""

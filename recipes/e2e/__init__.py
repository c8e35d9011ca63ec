"""LoRA on the E2E texts, scored by five metrics."""

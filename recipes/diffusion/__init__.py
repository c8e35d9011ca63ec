"""A concept LoRA for Stable Diffusion."""

"""Supervised fine-tuning by TRL."""

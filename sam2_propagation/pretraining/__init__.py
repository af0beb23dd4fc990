"""Synthetic anatomy and the recipe that made the built-in checkpoint."""

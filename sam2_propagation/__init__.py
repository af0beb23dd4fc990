"""Carry labels from annotated images to others: arrays in, arrays out, no files and no nnU-Net."""

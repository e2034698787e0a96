"""Flax Linen modules: tokens, fusions, interaction."""

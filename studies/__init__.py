"""Experiments about the optimizers."""

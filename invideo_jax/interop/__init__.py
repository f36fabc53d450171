"""Weights between this package and PyTorch layouts."""

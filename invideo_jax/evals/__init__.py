"""Evaluators: predict + data -> (name, value) pairs; one file each."""

"""The video path, from files to NumPy batches. Imports no JAX: its workers are processes."""

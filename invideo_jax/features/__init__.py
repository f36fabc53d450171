"""Features of videos from a trained or imported encoder: `python -m invideo_jax.features`.

windows.py cuts a video in windows, reading.py decodes them in order, encoder.py opens a checkpoint and
computes, store.py keeps finished rows and writes the result, extract.py puts them together.
"""

"""One public train step per file; `update.py` holds what they share."""

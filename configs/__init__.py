"""Recipes: one file per runnable experiment; see docs/configs.md."""

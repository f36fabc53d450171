"""Tables and pictures of a run, from its workdir alone: `python -m invideo_jax.report WORKDIR`."""

from invideo_jax.report.page import build

__all__ = ["build"]

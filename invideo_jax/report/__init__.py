"""Tables and pictures of a run, from its workdir alone: `python -m invideo_jax.report WORKDIR`."""

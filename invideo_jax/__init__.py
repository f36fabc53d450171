"""invideo_jax: InternVideo-style video foundation model pretraining in JAX/Flax."""

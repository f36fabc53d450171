"""InternVideo-Next (arXiv:2512.01342): its second stage, latent prediction."""

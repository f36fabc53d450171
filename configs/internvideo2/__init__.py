"""InternVideo2 (arXiv:2403.15377): stage 1, and its distillation to smaller encoders."""

"""The scenes of the built-in dataset: what happens (scene), how it looks (pixels), sounds and is told."""

"""flax.linen models, init/apply only: no optimiser, no mesh, no config object in here."""

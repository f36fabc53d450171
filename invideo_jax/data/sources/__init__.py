"""Random access to raw examples: one file per kind of storage."""

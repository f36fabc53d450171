"""UMT (arXiv:2303.16058), the lineage of InternVideo2's first stage."""

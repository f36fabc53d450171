"""InternVideo (arXiv:2212.03191): its masked branch is VideoMAE."""

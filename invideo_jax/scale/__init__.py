"""What a step costs, and whether it fits: exact FLOPs, compiled memory."""

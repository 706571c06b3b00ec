"""What a step costs: FLOPs and host syncs."""

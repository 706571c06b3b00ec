"""VISE itself: roles, evidence, rewards, loss, one update."""

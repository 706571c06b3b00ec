"""What knows nothing of VISE: errors, randomness, screen, files, signals."""

"""What can be set, presets, and the words that set it."""

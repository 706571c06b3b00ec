"""The life of a run: its directory, its dry run, and running out of memory."""

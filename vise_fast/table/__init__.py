"""`python -m vise_fast.table`: base and adapter on lmms-eval's tasks, side by side."""

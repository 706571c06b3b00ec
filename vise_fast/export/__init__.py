"""`python -m vise_fast.export`: an adapter in the form that its next reader takes."""

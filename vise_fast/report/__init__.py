"""One page that shows a run: `python -m vise_fast.report RUN`."""

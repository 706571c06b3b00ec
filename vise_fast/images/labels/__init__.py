"""What somebody marked on a few pictures, to check with and never to train on: readers of the usual
files, the pictures they speak of, and the guard that keeps them out of every batch.
"""

"""Ids in, ids out: encode once, prefill once, fork, decode, score."""

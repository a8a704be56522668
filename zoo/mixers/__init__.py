"""Sequence mixers, one file each; the registry finds them."""

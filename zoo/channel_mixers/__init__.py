"""Feed-forward family, one file each, same contract as sequence mixers."""

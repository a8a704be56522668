"""The command `zoo bench`, and studies."""

if __name__ != "zoo.benchmarks":  # from the root of a checkout, where a second copy would have registries of its own
    raise ImportError("benchmarks is zoo.benchmarks now.")

"""What `zoo.benchmarks.ops` measures: every module here has `cases() -> dict[str, Case]`."""

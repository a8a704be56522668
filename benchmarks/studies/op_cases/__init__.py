"""What `zoo.benchmarks.studies.ops` measures: every module here has `cases() -> dict[str, Case]`."""

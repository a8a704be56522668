"""The ground floor, which everything else stands on: registries, strict options, errors, and files."""

"""Many trainings as one study: a search over options, and one store of its results."""

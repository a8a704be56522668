"""Generators with exact scoring. Of `zoo`, they import the ground floor alone (`zoo.core`)."""

if __name__ != "zoo.tasks":  # from the root of a checkout, where a second copy would have registries of its own
    raise ImportError("tasks is zoo.tasks now, and tasks.registry is zoo.core.options, .errors and .registry.")

from zoo.core.errors import UsageError
from zoo.tasks.own import from_batches, from_dataset
from zoo.tasks.protocol import IGNORE, Batch, Task, create_task, list_tasks, register

__all__ = [
    "IGNORE",
    "Batch",
    "Task",
    "UsageError",
    "create_task",
    "from_batches",
    "from_dataset",
    "list_tasks",
    "register",
]

"""Generators with exact scoring. Imports nothing of `zoo`."""

from tasks.protocol import IGNORE, Batch, Task, create_task, list_tasks, register
from tasks.registry import UsageError

__all__ = ["IGNORE", "Batch", "Task", "UsageError", "create_task", "list_tasks", "register"]

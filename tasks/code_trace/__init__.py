"""Traces of small Python programs: grammar, tracer, other people's files, and the task itself."""

from zoo.tasks.code_trace.sandbox import Example, read_functions
from zoo.tasks.code_trace.task import CodeTrace
from zoo.tasks.code_trace.tracer import Frame, Tracer

__all__ = ["CodeTrace", "Example", "Frame", "Tracer", "read_functions"]

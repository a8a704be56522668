"""The settings of MAD (Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", 2024; arXiv 2403.17844).

MAD asks a small model six questions, each in a baseline setting, which is what the task's options are by default, and
in settings that differ from it in one option or in the number of training rows.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from zoo.tasks.protocol import Task, registry

TEST_ROWS = 1280


class Setting(NamedTuple):
    """One setting of a task of MAD.

    Attributes:
        changed: the option that differs from the baseline, `rows`, or "" for the baseline itself.
        options: options of the task, where they differ from the defaults.
        rows: training rows, which every epoch shows once.
    """

    changed: str
    options: dict[str, Any]
    rows: int


class MADTask(Task):
    """A task of MAD. The defaults of its options are the published baseline."""

    mad_rows: ClassVar[int] = 12_800
    """Training rows of the baseline."""
    mad_variations: ClassVar[dict[str, tuple[Any, ...]]]
    """The published values of each option beside the baseline's; `rows` is the number of training rows."""

    @classmethod
    def mad_settings(cls) -> list[Setting]:
        """The baseline, then every variation."""
        settings = [Setting("", {}, cls.mad_rows)]
        for option, values in cls.mad_variations.items():
            for value in values:
                if option == "rows":
                    settings.append(Setting(option, {}, value))
                else:
                    settings.append(Setting(option, {option: value}, cls.mad_rows))
        return settings


def mad_tasks() -> dict[str, type[MADTask]]:
    """The tasks of MAD by name."""
    return {name: cls for name in registry.names() if issubclass(cls := registry[name], MADTask)}

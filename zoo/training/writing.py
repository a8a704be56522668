"""A checkpoint that processes write together in the background, each its own files; the manifest comes last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from zoo.core.errors import RunError
from zoo.training import checkpoint
from zoo.training.group import Group
from zoo.training.pieces import piece


class Writing:
    """A checkpoint on its way, of copies of what it is given: training goes on meanwhile.

    All processes make it and end it at the same places, and see the same folder.

    Args:
        group: the processes.
        folder: of the checkpoints.
        step: of the checkpoint.
        tensors: this process's pieces, by the names that the files of whole tensors would have.
        training: what the leading process writes beside them.
        best: the step of the best weights so far.
        config: of the run.

    Raises:
        RunError: the file system refuses.
    """

    def __init__(
        self,
        group: Group,
        folder: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        training: Mapping[str, Any],
        *,
        best: int | None,
        config: Mapping[str, Any],
    ):
        self._group, self._step, self._best, self._config = group, step, best, config
        self._temporary = group.told(lambda: checkpoint.begin(folder, step))
        files = {piece(name, group.rank, group.size): _copied(dict(each)) for name, each in tensors.items()}
        own = _copied(dict(training)) if group.leads else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._files: Future[dict[str, dict[str, Any]]] = self._worker.submit(
            checkpoint.write, self._temporary, files, own
        )
        self._worker.shutdown(wait=False)

    def is_done(self) -> bool:
        """Whether this process's files are there, or cannot be written."""
        return self._files.done()

    def end(self) -> Path:
        """Wait for the files of all processes, and give the checkpoint its name.

        Raises:
            RunError: a file could not be written, in any process; earlier checkpoints are as they were.
        """
        files: dict[str, dict[str, Any]] = {}
        problem: str | None = None
        try:
            files = self._files.result()
        except RunError as error:
            problem = str(error)
        found = [each for (each,) in self._group.gathered([(files, problem)])]
        problems = [told for _, told in found if told is not None]

        def finish() -> Path:
            try:
                if problems:
                    raise RunError(problems[0])
                listed = {name: told for each, _ in found for name, told in each.items()}
                return checkpoint.complete(self._temporary, self._step, listed, best=self._best, config=self._config)
            finally:
                shutil.rmtree(self._temporary, ignore_errors=True)

        return self._group.told(finish)


def _copied(data: Any) -> Any:
    """Plain data with copies of its tensors on the CPU."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), data)


__all__ = ["Writing"]

"""The task `code_trace`."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import strings
from zoo.tasks.code_trace import picture, programs, tokens
from zoo.tasks.code_trace.sources import FromFile, Generator, Program, Source, Tested
from zoo.tasks.protocol import IGNORE, Batch, Split, Task, check_request, names_of, register

_FRAME, _END = ord(tokens.FRAME), ord(tokens.END)


@register("code_trace")
class CodeTrace(Task):
    """Read a program and predict its execution trace, line by line.

    A program, its trace as a person sees it, and where the trace begins as tokens (`|` before and after each separator,
    `.` is `IGNORE`):

        ```
        def main():  # << START_OF_TRACE      call      {}                    def main():
         a = 4                                line      {}                     a = 4
         for i in range(2):                   line      {"a": "4"}             for i in range(2):
          a += i                              line      {"a": "..", "i": "0"}   a += i
         return a                             ...
                                              return                           return a   "5"

        inputs  ... r e t u r n   a \\n |frame_sep| |call_sep| {          }            |action_sep| d e f ...
        targets ... . . . . . .   . .  |call_sep|  {          }          |action_sep| d            e f   ...
        ```

    Rows are in the trace form of CWM: the program, then for each step a frame of the local variables before it (as
    JSON, values as strings, `..` if a value is the same as in the scope's previous frame) and the source line. A
    returned value or an exception (the name of its type) follows its line. Tokens are ASCII characters and ten
    separators; only the trace is scored. Programs are drawn from a random grammar and indented by one space; a program
    whose trace or values are too large is drawn again. Splits are disjoint up to the names in programs.

    With answer="final" only the last value of the same programs is scored. Its `exact` beside that of answer="trace"
    shows whether the trace helps: if every position of a trace is right, given all positions before it, greedy decoding
    writes the same trace.

    The score has `frames`, the share of frames with every token right, and `final`, whether the last value and its kind
    are right; `accuracy` is by token and `exact` by trace. Slices: `lines`, rounded up to 4, 6, 8, 12, 16, 24, ..., and
    whether the program has a `branch`, a `loop`, a `list`, calls another function (`call`) or raises (`exception`).
    """

    class Config(Options):
        """Options of `code_trace`."""

        seq_len: Annotated[int, Field(ge=64)] = 512
        """Length of a row; a program that does not fit with its trace is drawn again."""
        answer: Literal["trace", "final"] = "trace"
        """The scored part: every step, or only the last value (of the same programs)."""
        max_statements: Annotated[int, Field(ge=1, le=1000)] = 6
        """Most statements of a program, besides those that define and return."""
        max_depth: NonNegativeInt = 2
        """Deepest nesting of branches and loops."""
        max_value: PositiveInt = 99
        """Largest absolute value of any number."""
        branches: bool = True
        """Programs have `if` and `else`, and leave loops by `break`."""
        loops: bool = True
        """Programs have `for` over ranges and lists, and `while`."""
        lists: bool = True
        """Programs have lists, read and changed in place."""
        calls: bool = True
        """Programs have a second function."""
        exceptions: bool = True
        """Programs divide by numbers that may be zero and read past the end of lists, inside or outside `try`."""
        path: str | None = None
        """A Python file of functions and example calls to use instead of the generator."""
        test_path: str | None = None
        """A file whose calls are all the test split. Functions of `path` that it calls are in no other split."""

    layout = "next_token"
    continues = True
    vocab_size = tokens.VOCAB_SIZE
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.seq_len = config.seq_len
        self._source = self._open()

    def _open(self) -> Source:
        c, most = self.config, self.config.seq_len + 1
        grammar = {name: getattr(c, name) for name in programs.Grammar._fields}
        if c.path is not None:
            steering = grammar.keys() & c.changed().keys()
            if steering:
                raise UsageError(
                    f"code_trace: {sorted(steering)[0]} steers the generator and cannot go with path={c.path!r}."
                )
            return FromFile(c.path, c.test_path, most)
        generator = Generator(programs.Grammar(**grammar), most)
        if c.test_path is None:
            return generator
        return Tested(generator, FromFile(c.test_path, c.test_path, most))

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        rows = self._source.take(start, n, split, seed)
        table = np.zeros((n, self.seq_len + 1), dtype=np.uint8)
        prompts = np.empty(n, dtype=np.int64)
        for i, (source, frames) in enumerate(rows):
            given = tokens.prompt(source)
            asked = tokens.trace_text(frames) if self.config.answer == "trace" else tokens.final_text(frames)
            prompts[i] = len(given)
            table[i, : len(given) + len(asked)] = tokens.to_tokens(given + asked)
        inputs, targets = table[:, :-1].astype(np.int64), table[:, 1:].astype(np.int64)
        unscored = (np.arange(1, self.seq_len + 1) < prompts[:, None]) | (targets == 0)
        targets[unscored] = IGNORE
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), _slices(rows))

    def problems(self, batch: Batch) -> Tensor:
        """Programs up to the names in them; of a file what its calls call, whatever their arguments."""
        prints = [self._source.fingerprint(self._program(batch, row)) for row in range(len(batch.inputs))]
        return names_of(np.array(prints, dtype=np.uint64))

    def _program(self, batch: Batch, row: int) -> str:
        """The source that a row begins with."""
        asked = int((batch.targets[row] != IGNORE).nonzero()[0])
        return tokens.to_text(batch.inputs[row, :asked].tolist()[2:])

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`frames`: the share of frames that are right. `final`: whether the last value is."""
        scored = batch.targets != IGNORE
        wrong = scored & (predictions != batch.targets)
        frame = (batch.inputs == _FRAME).cumsum(1)  # from 1 on in the trace; the end of the text is past the last
        n, count = len(frame), int(frame.max()) + 1
        broken = torch.zeros(n, count).scatter_add_(1, frame, wrong.float()) > 0
        size = torch.zeros(n, count).scatter_add_(1, frame, (scored & (batch.targets != _END)).float())
        right = ((size > 0) & ~broken).sum(1) / (size > 0).sum(1)
        said = [tokens.outcome(tokens.to_text(p[s].tolist())) for p, s in zip(predictions, scored, strict=True)]
        true = [tokens.outcome(tokens.to_text(t[s].tolist())) for t, s in zip(batch.targets, scored, strict=True)]
        final = torch.tensor([a == b for a, b in zip(said, true, strict=True)])
        return {"frames": right.double(), "final": final.double()}

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        scored = batch.targets[row] != IGNORE
        trace = tokens.to_text(batch.targets[row][scored].tolist())
        said = None if predictions is None else tokens.to_text(predictions[row][scored].tolist())
        return picture.side_by_side(self._program(batch, row), trace, said)

    def spell(self, token: int) -> str:
        character = tokens.to_text([token])
        return character if character.isprintable() else "·"


def _slices(rows: list[Program]) -> dict[str, Tensor]:
    lines = strings.length_bucket(np.array([source.count("\n") for source, _ in rows]))
    slices = {"lines": torch.from_numpy(lines)}
    for name in ("branch", "loop", "list", "call", "exception"):
        slices[name] = torch.tensor([programs.has(name, source, frames) for source, frames in rows]).long()
    return slices

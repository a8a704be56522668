"""Which seeds learned anything."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.core.errors import UsageError, quoted
from zoo.statistics import Scores, binomial_interval, clustered_interval
from zoo.statistics.scores import Rows, by_problem

_CLEAR = 6  # standard errors


@dataclass(frozen=True)
class Learning:
    """How many seeds learned.

    Attributes:
        n: seeds that could be judged; 0 where there is nothing to judge by.
        learned: those that learned.
    """

    n: int = 0
    learned: int = 0

    @property
    def failed(self) -> int:
        """Seeds that did not learn."""
        return self.n - self.learned

    @property
    def none(self) -> bool:
        """Whether no seed learned."""
        return self.n > 0 and self.learned == 0

    @property
    def text(self) -> str:
        """Such as `1 of 3`, empty where nothing is known."""
        return f"{self.failed} of {self.n}" if self.n else ""


@dataclass(frozen=True)
class Rule:
    """When a seed has learned.

    With a threshold: its figure is at least that (of a loss or an error: at most). Without: the 95 % interval of its
    figure over the test problems lies above chance, the figure of a constant answer; of an error, below that of the
    task's trivial predictor.

    Attributes:
        threshold: None for chance.
        lower: whether a smaller figure is better.
    """

    threshold: float | None = None
    lower: bool = False

    @classmethod
    def read(cls, text: str | None, lower: bool) -> Rule:
        """The rule of the option --learned: `chance`, or a number.

        Raises:
            UsageError: neither.
        """
        if text is None or text == "chance":
            return cls(None, lower)
        try:
            return cls(float(text), lower)
        except ValueError:
            raise UsageError(
                f"--learned {quoted(text)} is not allowed: it should be 'chance', or a figure from which on a seed has "
                "learned, such as 0.9."
            ) from None

    @property
    def text(self) -> str:
        """What the share counts, in words."""
        if self.threshold is None and self.lower:
            return (
                "a seed has not learned if the 95% interval of its error over test problems is not below the error of "
                "the trivial predictor"
            )
        if self.threshold is None:
            return "a seed has not learned if the 95% interval of its figure over test problems is not above chance"
        return f"a seed has not learned if its figure is {'above' if self.lower else 'below'} {self.threshold:g}"

    def judge(self, scores: Scores | None, chance: float | None, n_problems: int) -> Learning:
        """Which seeds learned.

        Args:
            scores: of the seeds, None without any.
            chance: the figure of a constant answer, or of the trivial predictor; None where unknown.
            n_problems: how many problems a figure rests on, where the scores of their rows are unknown.
        """
        if scores is None:
            return Learning()
        if self.threshold is not None:
            met = scores.figures <= self.threshold if self.lower else scores.figures >= self.threshold
            return Learning(len(met), int(met.sum()))
        if chance is None:
            return Learning()
        better = [self._better(scores, i, chance, n_problems) for i in range(len(scores.seeds))]
        return Learning() if None in better else Learning(len(better), sum(map(bool, better)))

    def _better(self, scores: Scores, i: int, chance: float, n_problems: int) -> bool | None:
        if scores.rows is not None and scores.n_problems > 1:
            own = Rows(scores.rows.values[i : i + 1], scores.rows.problems)
            of_problems = by_problem(own)[0]
            error = float(of_problems.std(ddof=1)) / len(of_problems) ** 0.5
            away = float(of_problems.mean()) - chance
            if error and abs(away) > _CLEAR * error:  # no need to draw: of 300 trials that takes half a minute
                return (away < 0) is self.lower
            interval = clustered_interval(own.values[0], own.problems)
        elif n_problems and not self.lower:
            interval = binomial_interval(min(float(scores.figures[i]), 1.0) * n_problems, n_problems)
        else:
            interval = None
        if interval is None:
            return None
        return interval.high < chance if self.lower else interval.low > chance

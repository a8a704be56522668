"""ARC: public puzzles and small made ones, augmentation, voting, and the task itself."""

from zoo.tasks.arc.augmentation import Augmentations, augmentations
from zoo.tasks.arc.files import read_puzzles, to_json
from zoo.tasks.arc.grids import Pair, Puzzle, from_tokens, to_tokens
from zoo.tasks.arc.made import made_puzzles
from zoo.tasks.arc.task import Arc
from zoo.tasks.arc.voting import Ballot, Guess, Vote, count_votes, two_guesses

__all__ = [
    "Arc",
    "Augmentations",
    "Ballot",
    "Guess",
    "Pair",
    "Puzzle",
    "Vote",
    "augmentations",
    "count_votes",
    "from_tokens",
    "made_puzzles",
    "read_puzzles",
    "to_json",
    "to_tokens",
    "two_guesses",
]

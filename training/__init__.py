"""Learning what the levels of a tree are made of and how they are ranked."""

from treemem.training.module import AllLevels, LevelPair, LevelsModule, TrainConfig
from treemem.training.questions import Question, read_pairs
from treemem.training.run import TrainReport, train_memory
from treemem.training.train import HierarchyTrainer, Outcome

__all__ = [
    "AllLevels",
    "HierarchyTrainer",
    "LevelPair",
    "LevelsModule",
    "Outcome",
    "Question",
    "TrainConfig",
    "TrainReport",
    "read_pairs",
    "train_memory",
]

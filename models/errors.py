"""What training refuses, one class each; the message has the five parts of every nestloop error."""

from nestloop.errors import NestloopError


class TrainingError(NestloopError):
    """Base of every error that data, recipes, training and checkpoints raise on purpose."""


class DatasetNotFoundError(TrainingError):
    """A path that holds no data set in a layout nestloop reads."""


class DatasetLayoutError(TrainingError):
    """A data set whose folders, columns or classes do not fit together."""


class TooManyUnreadableError(TrainingError):
    """More unreadable images than the recipe's fraction allows."""


class UnknownRecipeError(TrainingError):
    """A recipe name that is no recipe and no file."""


class RecipeError(TrainingError):
    """Recipe settings that contradict each other or the data."""


class RunFolderError(TrainingError):
    """A run folder that already holds a run, or holds none to continue."""


class CheckpointError(TrainingError):
    """A checkpoint that is missing, damaged or belongs to other settings."""


class NonFiniteError(TrainingError):
    """A loss or gradient that is not a finite number."""

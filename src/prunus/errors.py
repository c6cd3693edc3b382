"""What can go wrong by the user's hand. The command line prints these and exits with code 2."""


class PrunusError(Exception):
    """A mistake the user can mend. The message says what, why, and what to do."""


class UnsupportedModel(PrunusError):
    """No family describes this model type, or a parameter of it is covered by no rule."""


class BadRecipe(PrunusError):
    """A recipe or flag is wrong. All mistakes are listed in one message."""


class BadCheckpoint(PrunusError):
    """A model folder or GGUF file that cannot be read, or whose weights are not usable."""


class BadData(PrunusError):
    """Text that is missing, unreadable, or too short."""


class BudgetUnreachable(PrunusError):
    """No legal architecture meets the budget."""


class BadOutput(PrunusError):
    """The output folder belongs to someone else, is in use, or the disk is full."""


class TrainingDiverged(PrunusError):
    """The loss is not finite, or explodes again and again."""


class Stopped(PrunusError):
    """The process was asked to stop, has saved its state, and goes on when the command is run again."""


class DoesNotFit(PrunusError):
    """The memory is too small for what was asked; the message says what would fit."""


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error of someone else's code says, for a message of ours."""
    return " ".join(str(error).split())[:most]

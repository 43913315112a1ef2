"""The errors that users see. Import-free, so that every folder may use it.

    GossamerError
    |-- RecipeError       an option, pattern or recipe that cannot work
    |-- ModelError        the model folder or its weights
    |-- DataError         calibration or evaluation text
    |-- CheckpointError   a file that is malformed, or does not say what it should
    |-- ResumeError       a partial run that does not belong to this command
    |-- ResourceError     disk, memory, permission
    |-- TrainingError     loss not finite, ranks disagree
    `-- KernelError       shape, dtype or storage that a kernel cannot take

Every message says what came and what is allowed; `hint` says what to do. The command line prints both on one line each
and exits with `exit_code`; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations


class GossamerError(Exception):
    """Base of all expected failures. `hint`: what the user can do about it.

    `alone`: in a run of several processes only this one failed, so nobody else will tell.
    """

    exit_code = 2
    alone = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} (hint: {self.hint})"


class RecipeError(GossamerError):
    """An option, pattern or recipe that cannot work on this model."""


class ModelError(GossamerError):
    """A missing, unsupported or damaged model."""


class DataError(GossamerError):
    """Missing, too short or overlapping text."""


class CheckpointError(GossamerError):
    """A checkpoint file that is malformed or fails verification."""


class ResumeError(GossamerError):
    """A partial run that was made by another recipe, input or version."""


class ResourceError(GossamerError):
    """Not enough disk or memory, or no permission."""


class TrainingError(GossamerError):
    """Training that cannot go on: loss not finite, ranks disagree."""

    exit_code = 1


class KernelError(GossamerError):
    """Arguments that a kernel cannot take."""

    exit_code = 1

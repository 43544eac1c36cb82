"""Every error `cafe` raises on purpose. Each message names the place, the field and the mend.

CafeError
 ├── DataError         a file, record or picture that cannot be used
 │    └── ImageError   a picture that cannot be decoded, or is out of bounds
 ├── RecipeError       a recipe key or value that is not valid
 ├── CheckpointError   a model directory or adapter that cannot be loaded
 ├── FamilyError       a model family that cafe has no facts for
 ├── TrainingError     a run that must stop (non-finite loss, full disk)
 └── WorkerError       a process that encodes for another and has died or cannot
"""

from __future__ import annotations


class CafeError(Exception):
    """Base class. The command line prints it in one line, without a traceback.

    exit_code   of the command that ended so: 2, or 128 + a signal's number
    """

    exit_code: int = 2


class DataError(CafeError):
    pass


class ImageError(DataError):
    pass


class RecipeError(CafeError):
    pass


class CheckpointError(CafeError):
    pass


class FamilyError(CafeError):
    pass


class TrainingError(CafeError):
    pass


class WorkerError(CafeError):
    pass

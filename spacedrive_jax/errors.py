"""The errors of the project: what a user, a file or a config got wrong, in one line that says what to do.

Anything else that is raised is a defect of the project. The command line prints these in one line and shows
a traceback only with `--debug`; a notebook catches them as the built-in errors they also are.
"""

from __future__ import annotations


class SpaceDriveError(Exception):
    """Something the user can mend. The message names the file, field, shape or flag, and what to do."""


class ConfigError(SpaceDriveError, ValueError):
    """A flag or a field of a config has a value that cannot be used."""


class DataError(SpaceDriveError, ValueError):
    """A file of data (tables, records, predictions, results) is missing, damaged or not what it should be."""


class CheckpointError(SpaceDriveError, OSError):
    """A checkpoint or a folder of weights is missing, damaged or belongs to something else."""

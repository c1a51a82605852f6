"""Errors that a user can mend. The command line prints them as one line; `--debug` shows the traceback."""


class LongwaveError(Exception):
    """Something went wrong that the message explains, with the way out. Exit status 1."""

    exit_status = 1


class UsageError(LongwaveError, ValueError):
    """What was asked for cannot be done as asked: an unknown key, a bad value. Exit status 2."""

    exit_status = 2

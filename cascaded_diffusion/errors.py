"""Errors that are meant for people: one line, no traceback, exit code 2."""


class UserError(Exception):
    """Something the user can put right.

    The message is one line. It names the value, what was expected, and the
    config key or flag to change. The binaries print it and exit with code 2.
    """

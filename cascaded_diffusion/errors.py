"""Errors that are meant for people: one line, no traceback, exit code 2."""


class UserError(Exception):
    """Something the user can put right.

    The message is one line. It names the value, what was expected, and the
    config key or flag to change. The binaries print it and exit with code 2.
    """


class SingleProcessError(UserError):
    """An error of one process of several, in a place where the others cannot be told.

    They wait for it in a collective until JAX finds that it is gone.
    """

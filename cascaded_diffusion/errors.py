"""Errors that are meant for people: one line, no traceback, exit code 2."""

EXIT_BAD_INPUT = 2
# EX_TEMPFAIL: the same command goes on, as after a signal, or after another process was lost.
EXIT_TRY_AGAIN = 75


class UserError(Exception):
    """Something the user can put right.

    The message is one line. It names the value, what was expected, and the
    config key or flag to change. The binaries print it and exit with code 2.

        try:
            config = cd.load_config("configs/mnist_base16.py", {"train.batch_size": 0})
        except cd.UserError as e:
            print(e)  # config.train.batch_size = 0: expected a value from 1 to 1048576
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA says that a device's memory does not suffice."""
    # By name, since JAX is not imported yet when flags are refused.
    return type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)

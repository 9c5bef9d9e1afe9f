"""Checks of flag values that several binaries need."""

from typing import TypeVar

from absl import flags

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.paths import check_path

# No flag needs a larger number; most have tighter bounds.
_MAX_NUMBER = 10**9
Number = TypeVar("Number", int, float)


def check_number(flag: str, value: object) -> None:
    """Raises UserError if the number given with a flag is not finite or too large."""
    if isinstance(value, (int, float)) and not abs(value) <= _MAX_NUMBER:  # nan neither
        raise UserError(f"{flag}={value:.4g}: expected a number of at most {_MAX_NUMBER:.0e}")


def check_paths(fv: flags.FlagValues, *names: str) -> None:
    """Checks the paths given with these flags, if any; see `check_path`."""
    for name in names:
        value = fv[name].value
        for path in value if isinstance(value, list) else [value]:
            if path is not None:
                check_path(path, f"--{name}")


def require(fv: flags.FlagValues, *names: str) -> None:
    """Raises UserError unless each of the flags was given."""
    for name in names:
        if fv[name].value in (None, ""):
            raise UserError(f"--{name} is missing: {fv[name].help}")


def numbers_in(fv: flags.FlagValues, name: str, kind: type[Number]) -> list[Number]:
    """The numbers of a list flag. Raises UserError if an item is not a number."""
    try:
        numbers = [kind(x) for x in fv[name].value]
    except ValueError as e:
        wanted = "integers" if kind is int else "numbers"
        given = ",".join(fv[name].value)
        raise UserError(f"--{name}={given}: expected {wanted} between commas") from e
    for number in numbers:
        check_number(f"--{name}", number)
    return numbers

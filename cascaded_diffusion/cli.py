"""The front door that all binaries share: flags, errors, JAX settings.

Flags, environment variables and `jax.config` are touched here and in the
binaries, nowhere else. Nothing here imports JAX before the flags and the config
have been found good, so a mistake is answered in a second.
"""

from __future__ import annotations

import ast
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from cascaded_diffusion.errors import UserError

EXIT_BAD_INPUT = 2
# EX_TEMPFAIL: stopped by a signal after saving; the same command goes on.
EXIT_PREEMPTED = 75

# With XLA's YNN fusions on, a convolution's training step runs at two thirds of
# the speed (see README, "Performance"). The flag is known to these jaxlib versions;
# an unknown flag would be fatal, so others do without.
_CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
_CPU_FLAG_VERSIONS = ((0, 10), (0, 12))


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a binary's `main(argv)` and exits with what it returns.

    A `UserError` becomes one line on stderr and exit code 2.
    """
    try:
        code = main(sys.argv)
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def define_config(flag_values: flags.FlagValues, argv: Sequence[str], help_text: str) -> None:
    """Adds `--config=FILE.py[:variant]`; see `config_values` for its overrides."""
    config_flags.DEFINE_config_file(
        "config", None, help_text, flag_values=flag_values, sys_argv=_without_overrides(argv)
    )


def parse(flag_values: flags.FlagValues, argv: Sequence[str], usage: str) -> None:
    """Parses `argv` strictly, but for the overrides of the config.

    Raises:
      UserError: an unknown flag, a stray argument, a config file that is not there
        or cannot be loaded.
    """
    flags.DEFINE_bool("help", False, "show this help", flag_values=flag_values)
    config_arg = _config_argument(argv)
    try:
        rest = flag_values(_without_overrides(argv))
    except flags.Error as e:
        raise UserError(str(e)) from e
    except UserError:
        raise
    except Exception as e:  # whatever the config file raises while it is loaded
        reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
        raise UserError(f"--config={config_arg}: cannot be loaded ({reason})") from e
    if flag_values["help"].value:
        print(f"{usage}\n{flag_values.get_help()}")
        sys.exit(0)
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag: flags look like --name=value")


def config_values(flag_values: flags.FlagValues, argv: Sequence[str]) -> dict[str, Any]:
    """The config file's values with the overrides `--config.section.key=value` applied.

    Overrides are read here, not by config_flags: it knows no type for a key whose
    value is None. Whether keys and types are right is for `config.py` to say.
    """
    config = flag_values["config"].value
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() returned {config!r:.40}, expected a ConfigDict")
    values = config.to_dict()
    for arg in argv[1:]:
        if not _is_override(arg):
            continue
        path, equals, text = arg.lstrip("-").partition("=")
        *sections, name = path.split(".")[1:]
        if not equals:
            raise UserError(f"{arg}: expected {arg}=value")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"{arg}: config key {section!r} is not a section")
        node[name] = _parse_value(text)
    return values


def _parse_value(text: str) -> Any:
    """A Python literal, `nan`, `inf`, `true` or `false`; any other text is a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (ast.literal_eval, float):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError):
            continue
    return text


def _is_override(arg: str) -> bool:
    return arg.startswith(("--config.", "-config."))


def _without_overrides(argv: Sequence[str]) -> list[str]:
    return [argv[0], *(arg for arg in argv[1:] if not _is_override(arg))]


def _config_argument(argv: Sequence[str]) -> str | None:
    """The value of `--config`, whose file is there; None where it was not given."""
    for i, arg in enumerate(argv):
        name, equals, value = arg.lstrip("-").partition("=")
        if name == "config" and arg.startswith("-"):
            if not equals:
                value = argv[i + 1] if i + 1 < len(argv) else ""
            path = pathlib.Path(value.partition(":")[0])
            if not path.is_file() or path.suffix != ".py":
                folder = path.parent if value and path.parent.is_dir() else pathlib.Path("configs")
                known = ", ".join(sorted(p.name for p in folder.glob("[a-z]*.py"))) or "none"
                raise UserError(f"--config={value}: no such .py file; in {folder}: {known}")
            return value
    return None


def require(flag_values: flags.FlagValues, *names: str) -> None:
    """Raises UserError unless each of the flags was given."""
    for name in names:
        if flag_values[name].value in (None, ""):
            raise UserError(f"--{name} is missing: {flag_values[name].help}")


def set_up_jax() -> Any:
    """Imports JAX with this project's settings and returns it.

    - On a CPU, XLA's slower convolution path is switched off.
    - Compiled programs are kept in `JAX_COMPILATION_CACHE_DIR`, by default
      `~/.cache/cascaded_diffusion/xla`: the second start of a run is quick.
    """
    from importlib.metadata import version

    jaxlib = tuple(int(x) for x in version("jaxlib").split(".")[:2])
    flags_now = os.environ.get("XLA_FLAGS", "")
    name = _CPU_FLAG.partition("=")[0]
    if _CPU_FLAG_VERSIONS[0] <= jaxlib <= _CPU_FLAG_VERSIONS[1] and name not in flags_now:
        os.environ["XLA_FLAGS"] = f"{flags_now} {_CPU_FLAG}".strip()
    absl_logging.set_verbosity(absl_logging.WARNING)
    # grain reads absl's own flags; a binary that parses none must say that it is done.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = pathlib.Path.home() / ".cache" / "cascaded_diffusion" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return jax

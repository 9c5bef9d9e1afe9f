"""The `--config` flag and the strict parsing of all flags."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from cascaded_diffusion.commands.flag_checks import check_number, require
from cascaded_diffusion.commands.overrides import with_overrides, without_overrides
from cascaded_diffusion.config.run_checks import cascade_config_from, check_chain, run_config_from
from cascaded_diffusion.config.schema import CascadeConfig, CascadeSection, RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import Record
from cascaded_diffusion.runtime.run_folder import CascadeFolder

_CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def define_config(fv: flags.FlagValues, argv: Sequence[str], help_text: str) -> None:
    """Adds `--config=FILE.py[:variant]`; see `config_values` for its overrides."""
    config_flags.DEFINE_config_file(
        "config", None, help_text, flag_values=fv, sys_argv=without_overrides(argv)
    )


def parse(
    fv: flags.FlagValues, argv: Sequence[str], usage: str, *required: str, positional: int = 0
) -> list[str]:
    """Parses `argv` strictly, but for the overrides of the config.

    Returns the arguments that are no flags, of which there may be so many as `positional`.

    Raises UserError for an unknown flag, a required one that is missing, a stray argument, and a
    config file that is not there or cannot be loaded.
    """
    flags.DEFINE_bool("help", False, "show this help", flag_values=fv)
    config_arg = config_argument(argv)
    try:
        with importing_from(config_arg):
            rest = fv(without_overrides(argv))
    except flags.Error as e:
        raise UserError(str(e)) from e
    except UserError:
        raise
    except Exception as e:  # whatever the config file raises while it is loaded
        reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
        beside = "; expected it beside the config file, or installed"
        hint = beside if isinstance(e, ModuleNotFoundError) else ""
        raise UserError(f"--config={config_arg}: cannot be loaded ({reason}){hint}") from e
    if fv["help"].value:
        print(f"{usage}\n{fv.get_help()}")
        sys.exit(0)
    if len(rest) > 1 + positional:
        raise UserError(f"{rest[1 + positional]!r} is not a flag: flags look like --name=value")
    for name in fv:
        check_number(f"--{name}", fv[name].value)
    require(fv, *required)
    return rest[1:]


@contextlib.contextmanager
def importing_from(config_arg: str | None) -> Iterator[None]:
    """While a config file is read, it can import what lies beside it; afterwards nobody can.

    What was imported from there is forgotten, for another config's folder may have a module of
    the same name.
    """
    if config_arg is None:
        yield
        return
    folder = pathlib.Path(config_arg.partition(":")[0]).resolve().parent
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            root = name.partition(".")[0]
            beside = (folder / f"{root}.py").exists() or (folder / root).is_dir()
            if beside and root not in before:
                del sys.modules[name]


def config_values(fv: flags.FlagValues, argv: Sequence[str]) -> Record:
    """The config file's values with the overrides `--config.section.key=value` applied.

    Overrides are not read by ml_collections, which knows no type for a key whose value is None.
    Keys and types are checked later, when the values become a dataclass.
    """
    config = fv["config"].value
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() returned {config!r:.40}, expected a ConfigDict")
    try:
        return with_overrides(config.to_dict(), argv)
    except RecursionError as e:
        raise UserError(f"--config={config_argument(argv)}: nested too deeply") from e


def config_path(argv: Sequence[str]) -> str:
    """The path of the config file, without its variant."""
    return (config_argument(argv) or "").partition(":")[0]


def load_config_file(folder: pathlib.Path, name: str) -> Record:
    """The values of another config file, `name.py` or `name.py:variant`, in `folder`."""
    fv = flags.FlagValues()
    argv = ["plan", f"--config={folder / name}"]
    define_config(fv, argv, "")
    parse(fv, argv, "")
    return config_values(fv, argv)


def shipped_configs(name: str) -> pathlib.Path:
    """The folder of the configs that a clone has, with `name`, which may have a variant, in it."""
    file = name.partition(":")[0]
    for folder in (pathlib.Path("configs"), _CONFIGS):
        if (folder / file).exists():
            return folder
    raise UserError(f"--config is missing, and no configs/{file} is here; run this in a clone")


def stage_configs(
    fv: flags.FlagValues, argv: Sequence[str]
) -> tuple[CascadeSection | None, list[RunConfig]]:
    """The stages of `--config`: of a cascade, with its section, or of one stage alone."""
    values = config_values(fv, argv)
    if "cascade" not in values:
        return None, [run_config_from(values)]
    section = cascade_config_from(values).cascade
    folder = pathlib.Path(config_path(argv)).parent
    configs = [run_config_from(load_config_file(folder, name)) for name in section.configs]
    check_chain(section, [config.stage for config in configs])
    return section, configs


def config_argument(argv: Sequence[str]) -> str | None:
    """The value of `--config`, whose file is there; None where it was not given."""
    for i, arg in enumerate(argv):
        name, equals, value = arg.lstrip("-").partition("=")
        if name == "config" and arg.startswith("-"):
            if not equals:
                value = argv[i + 1] if i + 1 < len(argv) else ""
            path = pathlib.Path(value.partition(":")[0])
            if not path.is_file() or path.suffix != ".py":
                folder = path.parent if value and path.parent.is_dir() else pathlib.Path("configs")
                files = sorted(folder.glob("[a-z]*.py"))
                known = [p.name for p in files if b"def get_config(" in p.read_bytes()]
                listed = ", ".join(known) or "none"
                raise UserError(f"--config={value}: no such .py file; in {folder}: {listed}")
            return value
    return None


def cascade_config(fv: flags.FlagValues, argv: Sequence[str], runs: CascadeFolder) -> CascadeConfig:
    """The cascade of `--config`, or without it the one that a sweep wrote to the folder."""
    if fv["config"].value is not None:
        values = config_values(fv, argv)
        if "stage" in values:
            given = config_argument(argv)
            raise UserError(f"--config={given}: the config of a stage, expected a cascade's")
        return cascade_config_from(values)
    if not runs.cascade_path.exists():
        raise UserError(
            f"--config is missing: {fv['config'].help}; there is no {runs.cascade_path},"
            " as `evaluate sweep --write_best` writes it, to be used without"
        )
    values = with_overrides(runs.read_cascade(), argv)
    try:
        return cascade_config_from(values)
    except UserError as e:
        raise UserError(f"{runs.cascade_path}: {e}") from e

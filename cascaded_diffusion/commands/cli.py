"""The front door that all binaries share: flags, errors, JAX settings.

Flags, environment variables and `jax.config` are touched here and in the
binaries, nowhere else. Nothing here imports JAX before the flags and the config
have been found good, so a mistake is answered in a second.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from cascaded_diffusion.commands.interrupts import EXIT_INTERRUPTED, INTERRUPTS
from cascaded_diffusion.config.convert import takes_text
from cascaded_diffusion.config.run_checks import cascade_config_from, check_chain
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig, StageConfig, to_dict
from cascaded_diffusion.errors import SingleProcessError, UserError
from cascaded_diffusion.files.paths import check_local_path
from cascaded_diffusion.runtime.cluster import MODES, Cluster, find_cluster, meet
from cascaded_diffusion.runtime.run_folder import CascadeFolder

EXIT_BAD_INPUT = 2
_MAX_LINE = 4000  # characters of an error: values can be long
# What asyncio says of it.
_LOOP_CLOSED = "Event loop is closed"
# What `data` advises, which knows no flags.
_OPEN_COMMAND = "prepare --config=..."
# EX_TEMPFAIL: stopped by a signal after saving; the same command goes on.
EXIT_PREEMPTED = 75

# With XLA's YNN fusions on, a training step of convolutions is slower (see README,
# "Performance"). The flag is known to these jaxlib versions; an unknown flag would be
# fatal, so others do without. Vectors of 512 bits (--xla_cpu_prefer_vector_width=512) would be
# a little faster yet, but with them XLA's arctan, which the time of a network is made of, is off
# by up to 2.5 (jaxlib 0.10.2).
CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
CPU_FLAG_VERSIONS = ((0, 10), (0, 12))
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a binary's `main(argv)` and exits with what it returns.

    A `UserError`, and an error of the operating system such as a full disk, becomes one line
    on stderr and exit code 2; Ctrl-C one line and exit code 130. File names that are not UTF-8
    are printed with escapes.
    """
    INTERRUPTS.install()
    threading.excepthook = _thread_failed
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv)
    except BrokenPipeError:  # whoever read the output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except (UserError, OSError) as e:
        print(f"error: {_one_line(e)}", file=sys.stderr, flush=True)
        code = EXIT_BAD_INPUT
        if isinstance(e, SingleProcessError):
            # At once: JAX would say goodbye to the others first, who do not listen.
            sys.stdout.flush()
            os._exit(code)
    except BaseException as e:
        # A library may have made another error of it.
        if not (isinstance(e, KeyboardInterrupt) or INTERRUPTS.seen):
            raise
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    INTERRUPTS.at_once = True
    sys.stdout.flush()
    sys.exit(code)


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """One line for a thread that could not write, TensorBoard's for one; the trace of others."""
    if isinstance(args.exc_value, OSError):
        _warn(args.exc_value)
    else:
        threading.__excepthook__(args)


def _unraisable(print_it: Callable[[Any], None], error: Any) -> None:
    """Tells of what fails where nobody can catch it, in a library's thread or at the exit.

    Left out is what tensorstore finds after Orbax's first error. Orbax closes its event loop as
    soon as one file cannot be written or read, and raises that error. Each thread that still
    works on another file then fails to hand over its result, for which nobody waits.
    """
    if isinstance(error.exc_value, OSError):  # TensorBoard's files are closed at the exit
        _warn(error.exc_value)
    elif not (isinstance(error.exc_value, RuntimeError) and str(error.exc_value) == _LOOP_CLOSED):
        print_it(error)


def _warn(error: OSError) -> None:
    print(f"warning: {_one_line(error)}", file=sys.stderr, flush=True)


def _one_line(error: UserError | OSError) -> str:
    """What is printed of an error: of limited length, with the command that the user has typed."""
    text = " ".join(_told(error).split())
    # Only then: it is an error itself if the config file is not there.
    if _OPEN_COMMAND in text and (config := _config_argument(sys.argv)):
        given = [f"--config={config}", *overrides_in(sys.argv)]
        text = text.replace(_OPEN_COMMAND, f"prepare {shlex.join(given)}")
    half = _MAX_LINE // 2
    return text if len(text) <= _MAX_LINE else f"{text[:half]} ... {text[-half:]}"


def _told(error: UserError | OSError) -> str:
    if isinstance(error, UserError) or error.strerror is None:
        return str(error) or type(error).__name__
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{error.strerror}"


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
        with _importing_from(config_arg):
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
    for name in flag_values:
        _check_number(f"--{name}", flag_values[name].value)


# Of the numbers of flags: each has its own reason to be smaller, none to be larger.
_MAX_NUMBER = 10**9


def _check_number(flag: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not abs(value) <= _MAX_NUMBER:  # nan neither
        raise UserError(f"{flag}={value:.4g}: expected a number of at most {_MAX_NUMBER:.0e}")


@contextlib.contextmanager
def _importing_from(config_arg: str | None) -> Iterator[None]:
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


def config_values(flag_values: flags.FlagValues, argv: Sequence[str]) -> dict[str, Any]:
    """The config file's values with the overrides `--config.section.key=value` applied.

    Overrides are read here, not by config_flags: it knows no type for a key whose
    value is None. Whether keys and types are right is for `config.py` to say.
    """
    config = flag_values["config"].value
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() returned {config!r:.40}, expected a ConfigDict")
    try:
        return with_overrides(config.to_dict(), argv)
    except RecursionError as e:
        raise UserError(f"--config={_config_argument(argv)}: nested too deeply") from e


def with_overrides(values: dict[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """A copy of `values`, nested, with the overrides of the command line applied.

    A number in a path counts in a tuple: `--config.cascade.samplers.0.num_steps=50`.
    """
    values = _unshared(values)
    for arg in argv[1:]:
        if not _is_override(arg):
            continue
        path, equals, text = arg.lstrip("-").partition("=")
        *sections, name = path.split(".")[1:]
        if not equals:
            raise UserError(f"{arg}: expected {arg}=value")
        node: Any = values
        for section in sections:
            node = _entered(node, section, arg)
        if not isinstance(node, dict):
            raise UserError(f"{arg}: {sections[-1]!r} has no keys by name; give it as a whole")
        root = CascadeConfig if "cascade" in values else RunConfig
        is_text, optional = takes_text(root, [*sections, name])
        if is_text:
            node[name] = None if optional and text == "None" else _unquoted(text)
        else:
            node[name] = _parse_value(text)
    return values


def _unshared(node: Any) -> Any:
    """A copy in which no section is in two places, as it may be in a config file."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_unshared(value) for value in node)
    return node


def _entered(node: Any, section: str, arg: str) -> Any:
    """The section of `node`, made if missing; tuples become lists that can be changed."""
    if isinstance(node, list):
        if section not in map(str, range(len(node))):
            raise UserError(f"{arg}: expected a number below {len(node)} for {section!r}")
        child = node[int(section)]
    else:
        if isinstance(node.get(section), tuple):
            node[section] = list(node[section])
        child = node.setdefault(section, {})
    if not isinstance(child, (dict, list)):
        raise UserError(f"{arg}: config key {section!r} is not a section")
    return child


def _parse_value(text: str) -> Any:
    """A Python literal, `nan`, `inf`, `true` or `false`; any other text is a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (ast.literal_eval, float):
        try:
            return read(text)
        # The last two: of thousands of brackets.
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text


def _unquoted(text: str) -> str:
    """The text itself; of a quoted string of Python, what it quotes."""
    if text[:1] in ("'", '"'):
        value = _parse_value(text)
        return value if isinstance(value, str) else text
    return text


def overrides_in(argv: Sequence[str]) -> list[str]:
    """The arguments that override config keys."""
    return [arg for arg in argv[1:] if _is_override(arg)]


def refuse_overrides(argv: Sequence[str], why: str) -> None:
    """Raises UserError if a config key is overridden where that would mean nothing."""
    overrides = overrides_in(argv)
    if overrides:
        raise UserError(f"{overrides[0]}: {why}")


def _is_override(arg: str) -> bool:
    return arg.startswith(("--config.", "-config."))


def _without_overrides(argv: Sequence[str]) -> list[str]:
    return [argv[0], *(arg for arg in argv[1:] if not _is_override(arg))]


def config_path(argv: Sequence[str]) -> str:
    """The path of the config file, without its variant."""
    return (_config_argument(argv) or "").partition(":")[0]


def load_config_file(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """The values of another config file, `name.py` or `name.py:variant`, in `folder`.

    Raises:
      UserError: it is not there or cannot be loaded.
    """
    fv = flags.FlagValues()
    argv = ["plan", f"--config={folder / name}"]
    define_config(fv, argv, "")
    parse(fv, argv, "")
    return config_values(fv, argv)


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


def check_paths(flag_values: flags.FlagValues, *names: str) -> None:
    """Checks the paths that flags name, if they were given: see `check_local_path`."""
    for name in names:
        value = flag_values[name].value
        for path in value if isinstance(value, list) else [value]:
            if path is not None:
                check_local_path(path, f"--{name}")


def require(flag_values: flags.FlagValues, *names: str) -> None:
    """Raises UserError unless each of the flags was given."""
    for name in names:
        if flag_values[name].value in (None, ""):
            raise UserError(f"--{name} is missing: {flag_values[name].help}")


def define_inception(flag_values: flags.FlagValues) -> None:
    """Adds the flags that say where Inception's weights are."""
    flags.DEFINE_string(
        "inception_weights",
        None,
        "file of the FID Inception weights; default: the cached ones, else a download",
        flag_values=flag_values,
    )
    flags.DEFINE_bool(
        "allow_other_inception_weights",
        False,
        "take weights that are not the public ones: the result is then no FID that others know",
        flag_values=flag_values,
    )


def check_inception(flag_values: flags.FlagValues) -> None:
    """Raises UserError if --inception_weights was given and no file is there."""
    check_paths(flag_values, "inception_weights")
    weights = flag_values.inception_weights
    if weights is not None and not pathlib.Path(weights).is_file():
        raise UserError(
            f"--inception_weights={weights}: no such file; without this flag the weights are those"
            " of the cache, or downloaded"
        )


def inception_loader(
    flag_values: flags.FlagValues, mesh: Any, *, batch_size: int = 64
) -> Callable[[str], Any]:
    """Returns a function: how to resize -> the Inception extractor of the flags' weights."""

    def load(resize: str) -> Any:
        from cascaded_diffusion.evaluation.features.inception_extractor import load_inception

        return load_inception(
            flag_values.inception_weights,
            resize=resize,
            allow_other_weights=flag_values.allow_other_inception_weights,
            mesh=mesh,
            batch_size=batch_size,
        )

    return load


def numbers_in(flag_values: flags.FlagValues, name: str, kind: type) -> list[Any]:
    """The numbers of a list flag. Raises UserError for what is none."""
    try:
        numbers = [kind(x) for x in flag_values[name].value]
    except ValueError as e:
        wanted = "integers" if kind is int else "numbers"
        raise UserError(
            f"--{name}={','.join(flag_values[name].value)}: expected {wanted} between commas"
        ) from e
    for number in numbers:
        _check_number(f"--{name}", number)
    return numbers


def _compilation_cache() -> pathlib.Path:
    """The default folder of compiled programs, one for each number of CPUs.

    A program for the CPU is cut for as many threads as there are at its compilation, and JAX's
    cache does not tell those apart: compiled on one CPU, it would leave the others idle for good.
    """
    try:
        cpus = int(os.environ["NPROC"])  # Which XLA goes by, too.
    except (KeyError, ValueError):
        schedulable = getattr(os, "sched_getaffinity", None)  # Linux only.
        cpus = len(schedulable(0)) if schedulable else os.cpu_count() or 1
    return pathlib.Path.home() / ".cache" / "cascaded_diffusion" / "xla" / f"{cpus}cpus"


def _keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed; elsewhere, or under GLIBC_TUNABLES, nothing.

    A step on a CPU allocates and frees hundreds of MB. Given back, each of their pages would be
    cleared anew by the kernel in the next step: a fifth of its time. Threads other than the main
    one still give back what is over 64 MB.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)


def set_up_jax(cluster: Cluster | None = None, *, platform: str | None = None) -> Any:
    """Imports JAX with this project's settings and returns it.

    With a `cluster`, of whose processes each calls this, it is one JAX over all of them. With a
    `platform`, as "cpu", it is of that one, and any other is left alone.

    - On a CPU, XLA's slower convolution path is switched off, and on one CPU device steps run
      in the thread that calls them, so that only one step's hundreds of MB are allocated at a
      time, and malloc keeps and reuses them. What `XLA_FLAGS`, `JAX_CPU_ENABLE_ASYNC_DISPATCH`
      and `GLIBC_TUNABLES` already say stays.
    - Numbers are of 32 bits, whatever `JAX_ENABLE_X64` says.
    - Compiled programs are kept in `JAX_COMPILATION_CACHE_DIR`, by default
      `~/.cache/cascaded_diffusion/xla/<N>cpus`: the second start of a run is quick.

    Raises:
      UserError: there is no device of the kind that `JAX_PLATFORMS` asks for.
    """
    from importlib.metadata import version

    jaxlib = tuple(int(x) for x in version("jaxlib").split(".")[:2])
    flags_now = os.environ.get("XLA_FLAGS", "")
    name = CPU_FLAG.partition("=")[0]
    if CPU_FLAG_VERSIONS[0] <= jaxlib <= CPU_FLAG_VERSIONS[1] and name not in flags_now:
        os.environ["XLA_FLAGS"] = f"{flags_now} {CPU_FLAG}".strip()
    absl_logging.set_verbosity(absl_logging.WARNING)
    # grain reads absl's own flags; a binary that parses none must say that it is done.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    import jax

    # Whatever JAX_ENABLE_X64 says: checkpoints, and what was tested, are of float32.
    jax.config.update("jax_enable_x64", False)
    if platform is not None:
        jax.config.update("jax_platforms", platform)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(_compilation_cache()))
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if cluster is not None:
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator,
            num_processes=cluster.num_processes,
            process_id=cluster.process_id,
            local_device_ids=cluster.local_device_ids,
            # On that address alone: JAX's default is every one that the machine has.
            coordinator_bind_address=cluster.coordinator,
        )
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as e:  # the latter of CUDA without a GPU, with no text
        asked = jax.config.jax_platforms or ""
        reason = (str(e).splitlines() or ["JAX finds no such device"])[0].strip()
        error = f"JAX_PLATFORMS={asked}: {reason}; here there is {_platforms_here(jax)}"
        raise (UserError if cluster is None else SingleProcessError)(error) from e
    if backend == "cpu":
        _keep_freed_memory()
    INTERRUPTS.at_once = False
    return jax


def _platforms_here(jax: Any) -> str:
    """The platforms that JAX finds if it may choose, for a message."""
    jax.config.update("jax_platforms", "")
    try:
        return " and ".join(sorted({"cpu", jax.default_backend()}))
    except (RuntimeError, AssertionError):
        return "none that works"


def define_cluster(flag_values: flags.FlagValues) -> None:
    """Adds the flags that say which processes make one job."""
    flags.DEFINE_enum(
        "distributed",
        "auto",
        MODES,
        "where the job's processes are named: auto (what the environment of Slurm or a TPU says),"
        " slurm, tpu (asks the metadata server), none",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, instead", flag_values=flag_values
    )
    flags.DEFINE_integer("num_processes", None, "of the job", flag_values=flag_values)
    flags.DEFINE_integer("process_id", None, "this one, from 0", flag_values=flag_values)
    flags.DEFINE_float(
        "coordinator_timeout_secs",
        300.0,
        "how long to wait for the other processes",
        lower_bound=0.1,
        flag_values=flag_values,
    )


def join_cluster(flag_values: flags.FlagValues, config: Any, *folders: str) -> Cluster | None:
    """Meets the job's other processes, if there are any, before JAX is set up.

    Args:
      flag_values: with those of `define_cluster`.
      config: a config dataclass, which all must have alike.
      folders: names of flags whose folders must be the same, too.

    Returns:
      What `set_up_jax` is to be given.

    Raises:
      UserError: they do not come, cannot be reached, or are configured differently.
    """
    cluster = _cluster(flag_values)
    if cluster is not None:
        facts = {**_flat("config", to_dict(config)), **_versions(), "our code": _code_digest()}
        for name in folders:
            given = flag_values[name].value
            facts[f"--{name}"] = None if given is None else str(pathlib.Path(given).resolve())
        meet(cluster, facts, timeout_secs=flag_values.coordinator_timeout_secs)
    return cluster


def refuse_cluster(flag_values: flags.FlagValues) -> None:
    """Raises UserError if this is one of several processes, for binaries that are one.

    With the flags of `define_cluster`, so that all binaries can be started alike.
    """
    cluster = _cluster(flag_values)
    if cluster is not None and cluster.num_processes > 1:
        raise UserError(
            f"evaluate is one process, not {cluster.num_processes}: have `sample` make the samples"
            " on all hosts and measure them by `evaluate --samples`, or start it on one host with"
            " --distributed=none"
        )


def _cluster(flag_values: flags.FlagValues) -> Cluster | None:
    return find_cluster(
        flag_values.distributed,
        os.environ,
        coordinator=flag_values.coordinator,
        num_processes=flag_values.num_processes,
        process_id=flag_values.process_id,
    )


def _code_digest() -> str:
    """Of the package's own files: another commit is another program."""
    digest = hashlib.sha256()
    package = pathlib.Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in _flat(f"{prefix}.{key}", part).items()}


def _versions() -> dict[str, str]:
    """Of what decides how a program is computed and stored."""
    from importlib.metadata import version

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    # And of what decides about the pixels.
    packages += ("grain", "opencv-python-headless", "pillow", "simplejpeg", "tensorflow-datasets")
    python = ".".join(map(str, sys.version_info[:2]))
    return {"python": python, **{f"package {name}": version(name) for name in packages}}


def cascade_config(
    flag_values: flags.FlagValues, argv: Sequence[str], runs: CascadeFolder
) -> CascadeConfig:
    """The cascade of `--config`, or without it the one that a sweep wrote to the folder.

    Raises:
      UserError: neither is there, or it is not a cascade's.
    """
    if flag_values["config"].value is not None:
        values = config_values(flag_values, argv)
        if "stage" in values:
            raise UserError(
                f"--config={_config_argument(argv)}: the config of a stage, expected a cascade's"
            )
        return cascade_config_from(values)
    if not runs.cascade_path.exists():
        raise UserError(
            f"--config is missing: {flag_values['config'].help}; there is no {runs.cascade_path},"
            " as `evaluate --sweep --write_best` writes it, to be used without"
        )
    values = with_overrides(runs.read_cascade(), argv)
    try:
        return cascade_config_from(values)
    except UserError as e:
        raise UserError(f"{runs.cascade_path}: {e}") from e


def check_cascade(config: CascadeConfig, stages: Sequence[StageConfig]) -> None:
    """Checks the first stages of a cascade, those given, as a cascade of their own."""
    section, num_stages = config.cascade, len(stages)
    first = dataclasses.replace(
        section,
        stages=section.stages[:num_stages],
        configs=section.configs[:num_stages],
        samplers=section.samplers[:num_stages],
        aug_levels=section.aug_levels[: num_stages - 1],
        truncated=section.truncated and any(s.has_aug_level for s in stages),
    )
    values = to_dict(dataclasses.replace(config, cascade=first))
    check_chain(cascade_config_from(values).cascade, stages)

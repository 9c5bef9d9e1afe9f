"""The flags of `plan`."""

import importlib.util

from absl import flags

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.planning.topologies import Topology, parse_topology


def define(fv: flags.FlagValues) -> None:
    """Adds the flags of `plan` besides --config."""
    text = "a slice, as v5e:16x16, v5p:4x4x8 or h100:8"
    flags.DEFINE_string("topology", None, text, flag_values=fv)
    text = "the share of the peak FLOP/s that is assumed"
    flags.DEFINE_float("efficiency", 0.4, text, flag_values=fv)
    text = "compile for the topology; default: if libtpu is installed"
    flags.DEFINE_bool("compile", None, text, flag_values=fv)
    flags.DEFINE_bool("json", False, "print one JSON object instead of a table", flag_values=fv)


def topology(fv: flags.FlagValues) -> tuple[Topology | None, bool]:
    """The slice that --topology names, if any, and whether to compile for it."""
    if not 0.001 <= fv.efficiency <= 1:
        raise UserError(f"--efficiency={fv.efficiency:g}: expected a share of the peak, 0.001 to 1")
    if fv.topology is None:
        return None, False
    found = parse_topology(fv.topology)
    has_compiler = importlib.util.find_spec("libtpu") is not None
    if fv.compile and not found.is_tpu:
        raise UserError(
            f"--compile: expected a TPU's --topology, not {found.name}: other compilers need the"
            " devices themselves"
        )
    if fv.compile and not has_compiler:
        raise UserError("--compile: libtpu is not installed; `pip install -e '.[tpu]'`")
    return found, found.is_tpu and fv.compile is not False and has_compiler

"""Writes all that is known of a run, or of a cascade, on one HTML page that can be mailed.

    python -m cascaded_diffusion.report --workdir=RUN/base16
    python -m cascaded_diffusion.report --workdir=RUN --output=cascade.html

RUN is a run folder, or a folder of runs that make a cascade. The page holds curves, sample
grids, sweeps, tables, configs and versions; it fetches nothing and runs nothing.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import config_flags, entry, flag_checks
from cascaded_diffusion.files.paths import check_writable


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "a run, or a folder of runs", flag_values=fv)
    text = "file to write; default: WORKDIR/report.html"
    flags.DEFINE_string("output", None, text, flag_values=fv)
    config_flags.parse(fv, argv, __doc__, "workdir")
    flag_checks.check_paths(fv, "workdir", "output")
    root = pathlib.Path(fv.workdir)
    output = pathlib.Path(fv.output) if fv.output else root / "report.html"
    # It draws plots, which the other binaries do without.
    from cascaded_diffusion.reporting.report import runs_in, write_report

    runs = runs_in(root)
    check_writable(output.parent, "output" if fv.output else "workdir")
    write_report(output, root, runs)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB", flush=True)
    return 0


if __name__ == "__main__":
    entry.run(main)

"""Writes all that is known of a run, or of a cascade, on one HTML page that can be mailed.

    python -m cascaded_diffusion.report --workdir=RUN/base16
    python -m cascaded_diffusion.report --workdir=RUN --output=cascade.html
    python -m cascaded_diffusion.report --workdir=RUN --serve

RUN is a run folder, or a folder of runs, whose curves are also drawn over each other. The page
holds curves, sample grids, sweeps, tables, configs and versions; it fetches nothing and runs
nothing. With --serve no file is written: the page is shown on this machine alone, at
http://127.0.0.1:8080 or --port, and follows the runs while they train, until Ctrl-C.
"""

from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import config_flags, entry, flag_checks
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import BucketPath, path_of
from cascaded_diffusion.files.paths import check_writable
from cascaded_diffusion.reporting.serve import make_server


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "a run, or a folder of runs", flag_values=fv)
    text = "file to write; default: WORKDIR/report.html"
    flags.DEFINE_string("output", None, text, flag_values=fv)
    flags.DEFINE_bool("serve", False, "show the page and follow the runs", flag_values=fv)
    text = "of --serve; 0 is any that is free"
    flags.DEFINE_integer("port", 8080, text, lower_bound=0, upper_bound=65_535, flag_values=fv)
    config_flags.parse(fv, argv, __doc__, "workdir")
    if fv.serve and fv.output:
        raise UserError(f"--output={fv.output}: --serve writes no file; leave one of them out")
    flag_checks.check_paths(fv, "workdir", "output")
    root = path_of(fv.workdir)
    output = path_of(fv.output) if fv.output else root / "report.html"
    # It draws plots, which the other binaries do without.
    from cascaded_diffusion.reporting.report import report_of, runs_in, write_report

    runs = runs_in(root)
    if fv.serve:
        if isinstance(root, BucketPath):
            problem = "--serve follows files on this machine; without it the page is written"
            raise UserError(f"--workdir={root}: {problem}")
        with make_server(root, lambda: report_of(root, runs_in(root)), fv.port) as server:
            print(f"http://127.0.0.1:{server.server_port}, until Ctrl-C", flush=True)
            server.serve_forever()
        return 0
    check_writable(output.parent, "output" if fv.output else "workdir")
    write_report(output, root, runs)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB", flush=True)
    return 0


if __name__ == "__main__":
    entry.run(main)

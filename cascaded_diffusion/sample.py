"""Samples a cascade of trained stages, at the checkpoints that evaluation chose.

    python -m cascaded_diffusion.sample --config=configs/mnist_cascade32.py --workdir=RUN

reads the runs RUN/<stage> that the config names (without --config: the cascade that
`evaluate --sweep --write_best` left in RUN/cascade.json) and writes, below --output
(default RUN/samples):

    samples.npz   arr_0 uint8 [n, H, W, C], arr_1 int64 labels [n] (ADM style)
    <stage>.npz   the same for every earlier stage (if truncated, still noisy and cut)
    samples.png   per class: real, low-res, enlarged real, base and cascade images

Sample i depends on (seed, i) alone: for another batch size, number of devices or of
hosts it is the same but for float rounding, a grey level or two in a few pixels.

Samples are kept batch by batch while they are made: the same command run again goes on
with the batches that are missing, on however many hosts. Several processes, started as for
`main`, divide the batches among them; --output is one folder that all of them see.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from absl import flags

from cascaded_diffusion import cli
from cascaded_diffusion.config import to_dict
from cascaded_diffusion.config_checks import check_chain, check_devices
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder

# So many samples, at most, are looked through for those of the picture.
_SHOWN = 2000
_POLL_SECS = 0.5


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    cli.define_config(fv, argv, "the cascade's config file, e.g. configs/mnist_cascade32.py")
    flags.DEFINE_string("workdir", None, "folder that holds the stages' runs", flag_values=fv)
    flags.DEFINE_string("output", None, "where to write; default: WORKDIR/samples", flag_values=fv)
    cli.define_cluster(fv)
    cli.parse(fv, argv, __doc__)
    cli.require(fv, "workdir")
    runs = CascadeFolder(fv.workdir)
    config = cli.cascade_config(fv, argv, runs)
    section = config.cascade
    folders = runs.stage_folders(section)
    run_configs = [folder.read_config() for folder in folders]
    check_chain(section, [c.stage for c in run_configs])
    for folder in folders:
        folder.chosen()
    output = RunFolder(fv.output or runs.path / "samples", flag="output")
    output.check_writable()

    cluster = cli.join_cluster(fv, config, "workdir", "output")
    jax = cli.set_up_jax(cluster)
    from cascaded_diffusion.cascade.cascade import Cascade
    from cascaded_diffusion.data.sources import load_source, spread_examples
    from cascaded_diffusion.evaluation import generate
    from cascaded_diffusion.evaluation.cascade_picture import cascade_picture
    from cascaded_diffusion.evaluation.classifier import LabelledImages
    from cascaded_diffusion.evaluation.sample_store import DamagedBatchError, SampleStore
    from cascaded_diffusion.evaluation.trained import load_trained
    from cascaded_diffusion.runtime.mesh import (
        build_mesh,
        check_shared,
        raise_together,
        together,
        told_by_first,
    )
    from cascaded_diffusion.runtime.pictures import save_png
    from cascaded_diffusion.runtime.samples import save_sample_batches

    # Every process samples by itself, on its own devices: nothing has to meet.
    check_devices(config, jax.local_device_count())
    mesh = build_mesh(config.mesh, jax.local_devices())
    with together():
        last = run_configs[-1]
        held_out = load_source(last.data, last.data.eval_split, last.stage)
        trained = [load_trained(folder, mesh) for folder in folders]
    check_shared(output.path, "output")
    is_first = jax.process_index() == 0
    stages, params = [t.stage for t in trained], [t.params for t in trained]
    cascade = Cascade(stages=stages, samplers=section.samplers, truncated=section.truncated)
    sampler = generate.make_cascade_sampler(
        cascade, section.aug_levels, seed=section.seed, mesh=mesh
    )
    how = {**to_dict(section), "stages": [t.identity for t in trained]}
    # The store's identity has them.
    del how["num_samples"], how["batch_size"], how["configs"]
    batches_folder = output.path / ".batches"
    store = SampleStore(
        batches_folder,
        how,
        num_samples=section.num_samples,
        batch_size=section.batch_size,
    )
    with together():
        if told_by_first([store.number]) != [store.number]:
            raise UserError(
                f"--workdir={runs.path}: evaluation chose other checkpoints while the processes"
                " started; run the same command again"
            )
    with contextlib.ExitStack() as stack:
        with together():
            if is_first:
                stack.enter_context(output.writer_lock("sample"))
                store.clear_failure()
                for t in trained:
                    print(t.name, flush=True)
        error = None
        try:
            generate.fill_cascade(
                store,
                sampler,
                params,
                num_classes=stages[0].config.num_classes,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        except ValueError as e:
            error = UserError(
                f"{e}: lower config.cascade.samplers.N.guidance_scale, or set its threshold"
            )
        except OSError as e:
            error = UserError(f"--output={output.path}: {e}")
        if error is not None:
            store.note_failure()
        # Hours, perhaps: no collective would wait so long.
        while store.missing() and not store.has_failed():
            time.sleep(_POLL_SECS)
        raise_together(error)
        if not is_first:
            return 0
        files = [*(f"{name}.npz" for name in section.stages[:-1]), "samples.npz"]
        try:
            for i, name in enumerate(files):
                size, channels = stages[i].config.resolution, stages[i].config.channels
                save_sample_batches(
                    output.path / name,
                    (section.num_samples, size, size, channels),
                    lambda key=f"images_{i}": ((b[key], b["labels"]) for b in store.batches()),
                )
            first = store.first(_SHOWN)
        except DamagedBatchError as e:
            raise UserError(str(e)) from e
        spread = spread_examples(held_out, rows=2, columns=10)
        picture = cascade_picture(
            cascade,
            params,
            section.aug_levels,
            [first[f"images_{i}"] for i in range(len(stages))],
            first["labels"],
            LabelledImages(spread["image"], spread["label"]),
            seed=section.seed,
            mesh=mesh,
        )
        save_png(output.path / "samples.png", picture)
        store.remove()
        with contextlib.suppress(OSError):  # another cascade's are in there
            batches_folder.rmdir()
    mode = "truncated" if section.truncated else "non-truncated"
    sizes = " -> ".join(f"{stage.config.resolution} px" for stage in stages)
    print(
        f"{section.num_samples} samples, {sizes}, aug_level {section.aug_levels} {mode}:"
        f" {output.path}/samples.npz, samples.png",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)

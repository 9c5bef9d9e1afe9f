"""Samples a cascade of trained stages, at the checkpoints that evaluation chose.

    python -m cascaded_diffusion.sample --config=configs/mnist_cascade32.py --workdir=RUN

reads the runs RUN/<stage> that the config names (without --config: the cascade that
`evaluate --sweep --write_best` left in RUN/cascade.json) and writes, below --output
(default RUN/samples):

    samples.npz   arr_0 uint8 [n, H, W, C], arr_1 int64 labels [n] (ADM style)
    <stage>.npz   the same for every earlier stage (if truncated, still noisy and cut)
    samples.png   per class: real, low-res, enlarged real, base and cascade images

Sample i depends on (seed, i) alone: for another batch size or number of devices it
is the same but for float rounding, a grey level or two in a few pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from cascaded_diffusion import cli
from cascaded_diffusion.config_checks import check_chain, check_devices
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    cli.define_config(fv, argv, "the cascade's config file, e.g. configs/mnist_cascade32.py")
    flags.DEFINE_string("workdir", None, "folder that holds the stages' runs", flag_values=fv)
    flags.DEFINE_string("output", None, "where to write; default: WORKDIR/samples", flag_values=fv)
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

    jax = cli.set_up_jax()
    from cascaded_diffusion.cascade.cascade import Cascade
    from cascaded_diffusion.data.sources import load_source, spread_examples
    from cascaded_diffusion.evaluation import generate
    from cascaded_diffusion.evaluation.cascade_picture import cascade_picture
    from cascaded_diffusion.evaluation.classifier import LabelledImages
    from cascaded_diffusion.evaluation.trained import load_trained
    from cascaded_diffusion.runtime.mesh import build_mesh
    from cascaded_diffusion.runtime.pictures import save_png
    from cascaded_diffusion.runtime.samples import save_samples

    last = run_configs[-1]
    held_out = load_source(last.data, last.data.eval_split, last.stage)
    spread = spread_examples(held_out, rows=2, columns=10)
    real = LabelledImages(spread["image"], spread["label"])
    check_devices(config, jax.device_count())
    mesh = build_mesh(config.mesh)
    trained = [load_trained(folder, mesh) for folder in folders]
    for t in trained:
        print(t.name, flush=True)
    stages, params = [t.stage for t in trained], [t.params for t in trained]
    cascade = Cascade(stages=stages, samplers=section.samplers, truncated=section.truncated)
    sampler = generate.make_cascade_sampler(
        cascade, section.aug_levels, seed=section.seed, mesh=mesh
    )
    try:
        images = generate.generate(
            sampler,
            params,
            num_samples=section.num_samples,
            batch_size=section.batch_size,
            label="cascade",
        )
    except ValueError as e:
        raise UserError(
            f"{e}: lower config.cascade.samplers.N.guidance_scale, or set its threshold"
        ) from e
    labels = generate.class_balanced_labels(section.num_samples, stages[0].config.num_classes)
    for name, stage_images in zip(section.stages[:-1], images[:-1], strict=True):
        save_samples(output.path / f"{name}.npz", stage_images, labels)
    save_samples(output.path / "samples.npz", images[-1], labels)

    picture = cascade_picture(
        cascade, params, section.aug_levels, images, labels, real, seed=section.seed, mesh=mesh
    )
    save_png(output.path / "samples.png", picture)
    mode = "truncated" if section.truncated else "non-truncated"
    sizes = " -> ".join(f"{x.shape[1]} px" for x in images)
    print(
        f"{len(images[-1])} samples, {sizes}, aug_level {section.aug_levels} {mode}:"
        f" {output.path}/samples.npz, samples.png",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)

"""The two forms of `reference`: for a run, and for images."""

from collections.abc import Sequence

from absl import flags

import cascaded_diffusion as library
from cascaded_diffusion.commands import jax_setup
from cascaded_diffusion.commands.config_flags import config_values
from cascaded_diffusion.commands.flag_checks import require
from cascaded_diffusion.commands.inception_flags import inception_loader
from cascaded_diffusion.commands.overrides import refuse_overrides
from cascaded_diffusion.commands.run_images import real_splits
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import open_images
from cascaded_diffusion.files.bucket import path_of
from cascaded_diffusion.files.paths import check_writable
from cascaded_diffusion.runtime.run_folder import RunFolder


def references_of_run(fv: flags.FlagValues, argv: Sequence[str]) -> None:
    """Makes the references of a run. Raises UserError for bad input."""
    if not fv.roles or not set(fv.roles) <= {"train", "val"}:
        raise UserError(f"--roles={','.join(fv.roles)}: expected train, val, or train,val")
    folder = RunFolder(fv.workdir)
    if folder.exists():
        reason = f"the run in {fv.workdir} has its own config.json"
        if fv.config is not None:
            raise UserError(f"--config: {reason}; leave it out")
        refuse_overrides(argv, reason)
        config = folder.read_config()
    else:
        if fv.config is None:
            folder.read_config()  # says that there is none
        config = run_config_from(config_values(fv, argv))
    folder.check_writable()
    jax_setup.set_up_jax()
    splits = real_splits(folder, config, data_path=None)
    evaluation = library.Evaluation(splits, inception=inception_loader(fv))
    library.write_references(folder, config, evaluation, fv.roles)


def reference_of_images(fv: flags.FlagValues) -> None:
    """Makes the reference of a file or folder. Raises UserError for bad input."""
    require(fv, "output")
    output = path_of(fv.output)
    if output.suffix != ".npz" or output.is_dir():
        raise UserError(f"--output={output}: expected a name that ends with .npz, of a file")
    check_writable(output.parent, "output")
    images = open_images(fv.images, flag="images")
    jax_setup.set_up_jax()
    load = inception_loader(fv)
    library.write_file_reference(images, output, resize=fv.resize or "legacy", inception=load)

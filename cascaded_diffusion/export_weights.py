"""Writes a trained stage's weights for PyTorch.

    python -m cascaded_diffusion.export_weights --workdir=RUN/adm_base64 \
        --source=guided_diffusion --output=adm_base64.safetensors
    python -m cascaded_diffusion.export_weights --workdir=RUN/iddpm_base64 \
        --source=diffusers --output=FOLDER

They are the averaged parameters of the chosen checkpoint, or of --step. For guided_diffusion and
improved_diffusion the output is a file of safetensors with the names of their state dict, in the
qkv order that --qkv_order says; for diffusers a folder for `UNet2DModel.from_pretrained`. Its
metadata say what number the network takes as its time step. `import_weights` reads them back to
the bit.
"""

from collections.abc import Sequence

from cascaded_diffusion.commands import entry, import_flags, jax_setup


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    request = import_flags.read_export(argv, __doc__)
    jax_setup.set_up_jax()
    import_flags.run_export(request)
    return 0


if __name__ == "__main__":
    entry.run(main)

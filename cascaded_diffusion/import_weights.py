"""Makes a run of weights that others have trained and published.

    python -m cascaded_diffusion.import_weights --source=guided_diffusion --model=imagenet64 \
        64x64_diffusion.pt --workdir=RUN/adm_base64
    python -m cascaded_diffusion.import_weights --source=guided_diffusion --model=upsample256 \
        64_256_upsampler.pt --workdir=RUN/adm_sr256
    python -m cascaded_diffusion.import_weights --source=diffusers FOLDER --workdir=RUN/mine \
        --config=configs/iddpm_base64.py

The run has one checkpoint, of step 0, which is chosen as the best: `sample`, `evaluate`, `report`
and further training take it like any other. --model names a published network of ADM
(guided_diffusion: imagenet64, imagenet128, imagenet256, imagenet256_uncond, imagenet512,
upsample256, upsample512) or of Improved DDPM (improved_diffusion: imagenet64, upsample256), whose
config is in configs/. For another network of these code bases, --config is its config, and
--qkv_order says in which order its attention has its outputs: `legacy`, by head, or `new`. A folder
of diffusers says itself what its UNet2DModel is; --config gives everything else.

A stage with Gaussian conditioning augmentation (--config=configs/adm_sr256.py:gaussian) has one
input more than the published one. It begins without any effect, and learns when the stage is
trained further. A file is read without running any code of it.
"""

from collections.abc import Sequence

from cascaded_diffusion.commands import entry, import_flags, jax_setup


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    request = import_flags.read_import(argv, __doc__)
    jax_setup.set_up_jax()
    import_flags.run_import(request)
    return 0


if __name__ == "__main__":
    entry.run(main)

"""ADM's 256 px cascade on ImageNet from published weights: adm_base64 and adm_sr256.

    python -m cascaded_diffusion.sample --config=configs/adm_cascade256.py --workdir=RUN

The stages' runs, RUN/adm_base64 and RUN/adm_sr256, are imported (see these files). The variants say
how they are sampled: `ddim` by 25 steps of DDIM, `dpmpp` by 25 of DPM-Solver++, else as published.
Expected FID: 7.49 to the training images (ADM, 50,000 samples); here not measured.
"""

from ml_collections import ConfigDict
from sections import adm_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    return adm_cascade(variant, stages=("adm_base64", "adm_sr256"), batch_size=64)

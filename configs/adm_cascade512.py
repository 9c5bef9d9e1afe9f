"""ADM's 512 px cascade on ImageNet from published weights: adm_base128 and adm_sr512.

    python -m cascaded_diffusion.sample --config=configs/adm_cascade512.py --workdir=RUN

The stages' runs, RUN/adm_base128 and RUN/adm_sr512, are imported (see these files). The variants
are those of adm_cascade256.
Expected FID: 9.96 to the training images (ADM, 50,000 samples); here not measured.
"""

from ml_collections import ConfigDict
from sections import adm_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    return adm_cascade(variant, stages=("adm_base128", "adm_sr512"), batch_size=16)

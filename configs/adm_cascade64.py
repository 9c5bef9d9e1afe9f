"""ADM's model of ImageNet at 64 px from published weights, sampled as a cascade of one stage.

    python -m cascaded_diffusion.sample --config=configs/adm_cascade64.py --workdir=RUN

The stage's run, RUN/adm_base64, is imported (see that file). The variants are those of
adm_cascade256. Expected FID: that of adm_base64; here not measured.
"""

from ml_collections import ConfigDict
from sections import adm_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    return adm_cascade(variant, stages=("adm_base64",), batch_size=64)

"""Networks whose trained weights are published, and which config is theirs."""

import dataclasses

_GUIDED = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
_IMPROVED = "https://openaipublic.blob.core.windows.net/diffusion/march-2021/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A file of weights.

    `sha256` is None where nobody has published it to our knowledge. `qkv_by_head` says how its
    attention is ordered, see `names`.
    """

    config: str  # a file of configs/, with its variant
    url: str
    parameters: int  # in all its tensors
    qkv_by_head: bool = True
    sha256: str | None = None

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


PUBLISHED: dict[str, dict[str, Published]] = {
    "guided_diffusion": {
        "imagenet64": Published(
            config="adm_base64.py",
            url=f"{_GUIDED}64x64_diffusion.pt",
            parameters=295_904_454,
            qkv_by_head=False,
        ),
        "imagenet128": Published(
            config="adm_base128.py",
            url=f"{_GUIDED}128x128_diffusion.pt",
            parameters=421_529_606,
        ),
        "imagenet256": Published(
            config="adm_base256.py",
            url=f"{_GUIDED}256x256_diffusion.pt",
            parameters=553_838_086,
        ),
        "imagenet256_uncond": Published(
            config="adm_base256.py:uncond",
            url=f"{_GUIDED}256x256_diffusion_uncond.pt",
            parameters=552_814_086,
            sha256="a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1",
        ),
        "imagenet512": Published(
            config="adm_base512.py",
            url=f"{_GUIDED}512x512_diffusion.pt",
            parameters=558_997_638,
        ),
        "upsample256": Published(
            config="adm_sr256.py",
            url=f"{_GUIDED}64_256_upsampler.pt",
            parameters=311_795_910,
        ),
        "upsample512": Published(
            config="adm_sr512.py",
            url=f"{_GUIDED}128_512_upsampler.pt",
            parameters=308_835_270,
        ),
    },
    "improved_diffusion": {
        "imagenet64": Published(
            config="iddpm_base64.py",
            url=f"{_IMPROVED}imagenet64_cond_270M_250K.pt",
            parameters=273_049_350,
        ),
        "upsample256": Published(
            config="iddpm_sr256.py",
            url=f"{_IMPROVED}upsample_cond_500K.pt",
            parameters=279_792_390,
        ),
    },
    "diffusers": {},
}


def looks_like(parameters: int) -> str | None:
    """Flags of a published network that has so many parameters, if there is one."""
    for source, models in PUBLISHED.items():
        for name, published in models.items():
            if published.parameters == parameters:
                return f"--source={source} --model={name}"
    return None

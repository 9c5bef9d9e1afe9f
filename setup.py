"""Packaging. Needs nothing but setuptools; see README for the two commands that use it."""

import pathlib

from setuptools import find_packages, setup

# Ranges begin at what the test suite has passed with.
CORE = [
    "absl-py>=2.1",
    "array_record>=0.8",
    "clu>=0.0.12",
    "flax>=0.12.8",
    "google-crc32c>=1.7",
    "grain>=0.2.18",
    # tensorflow-datasets needs it and does not say so.
    "importlib_resources",
    "jax>=0.10.2",
    "matplotlib>=3.11",
    "ml_collections>=1.1.0",
    "numpy>=2.0",
    "opencv-python-headless>=4.10",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=11",
    "safetensors>=0.5",
    "simplejpeg>=1.9",
    "tensorboardX>=2.6.5",
    "tensorflow-datasets>=4.9.10",
    "tqdm>=4.66",
]
DEMO = ["mlxtend>=0.25"]
# Runs and data in buckets of Cloud Storage.
GCS = ["gcsfs>=2025.7"]
# The generator of the site, and its reader of docstrings.
DOCS = ["zensical>=0.0.73", "mkdocstrings-python>=2.0.11"]

setup(
    name="cascaded_diffusion",
    version="0.1.0",
    description="Cascaded diffusion models (Ho et al., 2021) in JAX",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["cascaded_diffusion", "cascaded_diffusion.*"]),
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require={
        "demo": DEMO,
        "docs": DOCS,
        "gcs": GCS,
        "test": [
            *DEMO,
            *DOCS,
            *GCS,
            "gcp-storage-emulator>=2026.7",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff==0.17.6",
            "tensorboard>=2.19",
        ],
        # Only for preparing data sets whose TFDS builders need TensorFlow.
        "tf": ["tensorflow-cpu>=2.21", "tensorboard>=2.19"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
    },
)

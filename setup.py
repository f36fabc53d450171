"""Installs invideo_jax: `pip install -e .` (add `[test]`, `[report]`, `[tensorboard]`, `[torch]`, ...)."""

import pathlib

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10.0,<0.13",
    "flax>=0.12.0,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "array-record>=0.8.3,<0.9",
    "tensorflow-datasets>=4.9.9,<5",
    "importlib_resources>=6",  # tensorflow-datasets imports it and does not declare it
    "sentencepiece>=0.2.1,<0.3",
    "ml_collections>=1.1.0,<2",
    "absl-py>=2.3,<3",
    "clu>=0.0.12,<0.1",
    "numpy>=2.1,<3",
    "einops>=0.8.1,<0.9",
    "safetensors>=0.6,<1",
    "msgpack>=1.1,<2",
    "av>=18.1,<20",
]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "text": ["tokenizers>=0.22,<0.24"],
    "aot": ["libtpu>=0.0.40,<0.1"],  # compiles for TPUs that are absent
    "parquet": ["pyarrow>=18,<30"],
    "tensorboard": ["tensorboardX>=2.6.4,<3"],
    "torch": [
        "torch>=2.7,<3",
        "transformers>=5.0,<6",
        "onnx>=1.17,<2",
        "onnxruntime>=1.20,<2",
    ],
    "test": [
        "pytest>=8.4,<10",
        "pytest-xdist>=3.6,<4",
        "hypothesis>=6.130,<7",
        "ruff>=0.12,<1",
        "tensorboard>=2.19,<3",
        "tokenizers>=0.22,<0.24",
        "pyarrow>=18,<30",
    ],
}

setup(
    name="invideo_jax",
    version="0.1.0",
    description="InternVideo-style video foundation model pretraining in JAX/Flax",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["invideo_jax", "invideo_jax.*"]),
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
)

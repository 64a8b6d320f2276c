"""Which packages a wheel holds; all else is said in pyproject.toml."""

from setuptools import find_packages, setup

BESIDE = "hf_knn_space.space_files"  # installed, what lies beside the demo's package lies inside it

setup(
    packages=[
        *find_packages(include=["hf_knn", "hf_knn.*", "hf_knn_cli", "hf_knn_cli.*"]),
        *find_packages("space"),
        BESIDE,
    ],
    package_dir={"hf_knn_space": "space/hf_knn_space", BESIDE: "space"},
)

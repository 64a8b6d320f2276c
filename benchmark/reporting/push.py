"""Pushes a folder of results to the Hub as a dataset, in one commit."""

from pathlib import Path

from huggingface_hub import HfApi

_PUSHED = (
    "run.json", "cells/*.json", "cells/*.npz", "failures/*.json", "report.md", "report.html",
    "README.md", "results.parquet", "figures/*",
)  # fmt: skip
CARD = """---
tags:
- image-classification
- benchmark
- hf_knn
configs:
- config_name: default
  data_files: results.parquet
---

"""
"""The front matter that makes the table the data set; the report follows it."""


def push_results(folder: Path, repo_id: str) -> str:
    """Pushes results and their report; the report is the card of the repository.

    Args:
        folder: a run's folder with its report in it.
        repo_id: `org/name`; made if it is missing.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: if the report or the table is not in the folder.
        HfHubHTTPError: if the Hub refuses, or somebody has pushed in between.
    """
    for name in ("report.md", "results.parquet"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"Expected {name} in `{folder}`, but it isn't there; do make the report without "
                "`--output` before a push."
            )
    text = (folder / "report.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(CARD + text, encoding="utf-8")
    api = HfApi(library_name="hf_knn")
    repo_id = api.create_repo(repo_id, repo_type="dataset", exist_ok=True).repo_id
    head = api.repo_info(repo_id, repo_type="dataset").sha
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, repo_type="dataset", parent_commit=head,
        commit_message="Results of benchmark/run.py", allow_patterns=list(_PUSHED),
        delete_patterns=["cells/*", "failures/*", "figures/*"],
    )  # fmt: skip
    return str(commit.commit_url)

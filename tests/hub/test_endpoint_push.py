"""`hf-knn push --endpoint`: the handler goes along, and goes away when nobody asks for it."""

from pathlib import Path

import pytest
from support.hub_checks import REPO
from support.hub_server import Hub
from typer.testing import CliRunner, Result

import hf_knn_cli
from hf_knn import KnnForImageClassification
from hf_knn.model.endpoint import MARK

NAMES = {"handler.py", "requirements.txt"}


def push(folder: Path, *options: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        hf_knn_cli.app, ["push", str(folder), REPO, *options]
    )


def test_a_handler_goes_along_only_if_it_is_asked_for(
    hub: Hub, model: KnnForImageClassification, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    assert push(tmp_path / "model").exit_code == 0
    assert not NAMES & set(hub.files(REPO))
    done = push(tmp_path / "model", "--endpoint")
    assert done.exit_code == 0, done.output
    assert "Inference Endpoints" in done.output
    there = hub.files(REPO)
    assert set(there) >= NAMES
    assert all(there[name].startswith(MARK.encode()) for name in NAMES)
    assert b"class EndpointHandler" in there["handler.py"]
    assert push(tmp_path / "model").exit_code == 0
    assert not NAMES & set(hub.files(REPO))


def test_a_handler_of_somebody_else_is_never_replaced(
    hub: Hub, model: KnnForImageClassification, tmp_path: Path
) -> None:
    from huggingface_hub import HfApi

    model.save_pretrained(tmp_path / "model")
    model.push_to_hub(REPO)
    HfApi().upload_file(
        path_or_fileobj=b"# mine", path_in_repo="handler.py", repo_id=REPO, repo_type="model"
    )
    before = hub.repo(REPO).branches["main"]
    refused = push(tmp_path / "model", "--endpoint")
    assert refused.exit_code == 1
    assert "hf-knn did not write" in refused.output
    assert hub.repo(REPO).branches["main"] == before
    assert push(tmp_path / "model").exit_code == 0
    assert hub.files(REPO)["handler.py"] == b"# mine"
    with pytest.raises(ValueError, match="of its own"):
        model.push_to_hub(REPO, endpoint=True)

"""What pushes ends with a whole repository in one commit, and what pulls reads all of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from support.hub_checks import REPO, assert_answers_alike, assert_whole
from support.hub_server import LFS_BYTES, TOKEN, Fault, Hub, sha256
from support.tiny import assert_same_rows, assert_same_tensors, pixels, tiny_model
from transformers import AutoModel, AutoModelForImageClassification, pipeline

from hf_knn import Datastore, KnnForImageClassification, MilvusDatastore
from hf_knn.store.hub import PushConflictError


def test_a_pushed_model_opens_with_the_auto_classes(hub: Hub, model: Any, cache: Path) -> None:
    commit = model.push_to_hub(REPO)
    assert len(hub.repo(REPO).history()) == 1
    assert_whole(hub)
    assert commit.oid == hub.repo(REPO).branches["main"]
    for opener in (AutoModel, AutoModelForImageClassification):
        found = opener.from_pretrained(REPO, cache_dir=cache)
        assert type(found) is KnnForImageClassification
        assert_same_tensors(found, model)
        assert_same_rows(found.datastore, model.datastore)
        assert_answers_alike(found, model)
        assert found.measured == model.measured
        assert found.origin == (REPO, commit.oid)
    plain = AutoModel.from_pretrained(REPO, cache_dir=cache, load_datastore=False)
    assert plain.datastore is None


def test_save_pretrained_can_push_too(hub: Hub, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=REPO, commit_message="hi")
    (commit,) = hub.repo(REPO).history()
    assert commit.message == "hi"
    assert_whole(hub)
    model.save_pretrained(tmp_path / "knn-two", push_to_hub=True)
    assert_whole(hub, "tester/knn-two")


def test_a_second_push_sends_what_changed_and_leaves_nothing_old(hub: Hub, model: Any) -> None:
    model.push_to_hub(REPO)
    first = assert_whole(hub)
    hub.uploaded.clear()
    model.datastore.add(torch.randn(4, 16), torch.tensor([0, 1, 2, 3]), torch.arange(90, 94))
    model.push_to_hub(REPO)
    second = assert_whole(hub)
    assert len(hub.repo(REPO).history()) == 2
    assert second["model.safetensors"] == first["model.safetensors"]
    assert len(second["model.safetensors"]) >= LFS_BYTES
    sent = {name for name, content in second.items() if first.get(name) != content}
    assert {name for name in sent if name.startswith("datastore-")}
    assert sha256(second["model.safetensors"]) not in hub.uploaded


def test_a_push_of_nothing_new_makes_no_commit(hub: Hub, model: Any) -> None:
    model.push_to_hub(REPO)
    model.push_to_hub(REPO)
    assert len(hub.repo(REPO).history()) == 1


def test_private_revision_and_pull_request(hub: Hub, model: Any, cache: Path) -> None:
    model.push_to_hub(REPO, private=True, revision="wide")
    assert hub.repo(REPO).private
    assert "config.json" not in hub.files(REPO, "main")
    assert_whole(hub, revision="wide")
    found = AutoModel.from_pretrained(REPO, revision="wide", cache_dir=cache)
    assert_answers_alike(found, model)
    commit = model.push_to_hub(REPO, create_pr=True)
    assert commit.pr_url.endswith("discussions/1")
    assert "config.json" not in hub.files(REPO, "main")
    assert_whole(hub, revision="refs/pr/1")
    found = AutoModel.from_pretrained(REPO, revision="refs/pr/1", cache_dir=cache)
    assert_answers_alike(found, model)
    with pytest.raises(OSError, match=r"private or gated|not a valid model|access"):
        AutoModel.from_pretrained(REPO, revision="wide", token=False, cache_dir=cache / "other")


def test_a_wrong_token_pushes_nothing(hub: Hub, model: Any) -> None:
    with pytest.raises(HfHubHTTPError, match="401"):
        model.push_to_hub(REPO, token="hf_wrong")
    assert not hub.repos


def test_nobody_is_overwritten(hub: Hub, model: Any, cache: Path) -> None:
    model.push_to_hub(REPO)
    mine = AutoModel.from_pretrained(REPO, cache_dir=cache)
    model.config.k = 7
    model.push_to_hub(REPO)  # it was pushed from here last: no conflict
    theirs = hub.files(REPO)
    mine.config.k = 9
    with pytest.raises(PushConflictError, match="nothing was overwritten"):
        mine.push_to_hub(REPO)
    assert hub.files(REPO) == theirs
    mine.push_to_hub(REPO, create_pr=True)
    assert hub.files(REPO) == theirs
    mine.push_to_hub(REPO, parent_commit=hub.repo(REPO).branches["main"])
    assert json.loads(hub.files(REPO)["config.json"])["k"] == 9


def test_a_commit_in_the_last_moment_is_a_conflict_too(hub: Hub, model: Any) -> None:
    model.push_to_hub(REPO)
    before = hub.files(REPO)
    model.config.k = 3
    hub.faults.append(Fault("status", "POST .*/commit/", status=412))
    with pytest.raises(PushConflictError, match="somebody has pushed"):
        model.push_to_hub(REPO)
    assert hub.files(REPO) == before


def test_an_interrupted_push_leaves_the_remote_whole_and_can_be_repeated(
    hub: Hub, model: Any, cache: Path
) -> None:
    model.push_to_hub(REPO)
    before, old = hub.files(REPO), int(model.datastore.labels[0])
    for pattern in ("POST .*/preupload/", "PUT /lfs/", "POST .*/commit/", "POST .*objects/batch"):
        model.datastore.relabel([int(model.datastore.ids[0])], [(old + 1) % 4])
        hub.faults[:] = [Fault("status", pattern, times=-1, status=403)]
        with pytest.raises((HfHubHTTPError, RuntimeError)):
            model.push_to_hub(REPO)
        assert hub.files(REPO) == before
        found = AutoModel.from_pretrained(REPO, cache_dir=cache)
        assert int(found.datastore.labels[0]) == old
    hub.faults.clear()
    model.push_to_hub(REPO)
    assert_whole(hub)


def test_all_files_are_of_one_revision(hub: Hub, model: Any, cache: Path) -> None:
    first = model.push_to_hub(REPO).oid
    other = tiny_model("vit", seed=5)
    other.push_to_hub(REPO, parent_commit=first)
    assert_answers_alike(AutoModel.from_pretrained(REPO, revision=first, cache_dir=cache), model)
    assert_answers_alike(AutoModel.from_pretrained(REPO, cache_dir=cache), other)


def test_offline_and_cached(hub: Hub, model: Any, cache: Path) -> None:
    model.push_to_hub(REPO)
    with pytest.raises(OSError, match=r"cached|connect|local"):
        AutoModel.from_pretrained(REPO, cache_dir=cache, local_files_only=True)
    AutoModel.from_pretrained(REPO, cache_dir=cache)
    hub.requests.clear()
    found = AutoModel.from_pretrained(REPO, cache_dir=cache, local_files_only=True)
    assert hub.requests == []
    assert_answers_alike(found, model)
    AutoModel.from_pretrained(REPO, cache_dir=cache, force_download=True)
    assert any("GET" in line and "model.safetensors" in line for line in hub.requests)


def test_a_subfolder(hub: Hub, model: Any, cache: Path) -> None:
    model.push_to_hub(REPO)
    repo = hub.repo(REPO)
    files = hub.files(REPO)
    repo.commit("main", {f"inner/{name}": content for name, content in files.items()}, "moved")
    found = KnnForImageClassification.from_pretrained(REPO, subfolder="inner", cache_dir=cache)
    assert_answers_alike(found, model)
    assert len(found.datastore) == len(model.datastore)


def test_the_pipeline_opens_a_repository(hub: Hub, model: Any) -> None:
    from PIL import Image

    model.push_to_hub(REPO)
    scores = pipeline("image-classification", model=REPO)(Image.new("RGB", (40, 40)), top_k=None)
    assert sum(score["score"] for score in scores) == pytest.approx(1, abs=1e-5)


# cards


def card_of(hub: Hub) -> Any:
    return ModelCard(hub.files(REPO)["README.md"].decode())


def test_the_card_tells_what_was_measured(hub: Hub, model: Any) -> None:
    model.push_to_hub(REPO)
    card = card_of(hub)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    assert {"knn", "hf-knn"} <= set(card.data.tags)
    values = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert values == {
        "top-1 (head alone)": 0.5, "top-1 (neighbours alone)": 0.25, "top-1 (blend)": 0.75
    }  # fmt: skip
    assert "| blend | 0.7500 |" in card.text
    assert "On 8 pictures of ants &amp; bees, split test." in card.text
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card.text
    size = sum(len(data) for name, data in hub.files(REPO).items() if name.startswith("datastore-"))
    assert f"40 rows of 16 values over 4 classes, {size / 1e6:.1f} MB;" in card.text
    assert "reveal something" in card.text


def test_what_users_wrote_survives_and_numbers_are_renewed(hub: Hub, model: Any) -> None:
    model.push_to_hub(REPO)
    old = hub.files(REPO)["README.md"].decode()
    edited = old.replace("---\n", "---\nlicense: mit\nlanguage: en\n", 1)
    edited = edited.replace("<!-- hf_knn: what", "My own words.\n\n<!-- hf_knn: what", 1)
    edited += "\nThanks to everybody.\n"
    repo = hub.repo(REPO)
    head = repo.commit("main", hub.files(REPO) | {"README.md": edited.encode()}, "by hand")
    model.measured["metrics"]["eval_blend_top1"] = 0.875
    model.push_to_hub(REPO, parent_commit=head)
    card = card_of(hub)
    assert card.data.license == "mit"
    assert card.data.language == "en"
    assert "My own words." in card.text
    assert "Thanks to everybody." in card.text
    assert "0.8750" in card.text
    assert "0.7500" not in card.text
    assert [r.metric_value for r in card.data.eval_results if "blend" in r.metric_name] == [0.875]
    assert card.text.count("## Datastore") == 1


def test_a_card_names_licence_and_the_revision_of_its_pictures(hub: Hub, model: Any) -> None:
    model.datastore.source = {"dataset": "org/bees", "split": "train", "revision": "5" * 40}
    model.push_to_hub(REPO, license="apache-2.0")
    card = card_of(hub)
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["org/bees"]
    assert f"revision {'5' * 40}" in card.text
    model.push_to_hub(REPO)
    assert card_of(hub).data.license == "apache-2.0"


def test_a_card_of_the_users_own_gets_our_part_at_its_end(hub: Hub, model: Any) -> None:
    hub.create(REPO).commit("main", {"README.md": b"# Mine\n\nHello."}, "by hand")
    model.push_to_hub(REPO)
    card = card_of(hub)
    assert card.text.strip().startswith("# Mine\n\nHello.")
    assert "## Datastore" in card.text


def test_names_in_a_card_are_text(hub: Hub, model: Any) -> None:
    model.measured["dataset"] = "<script>alert(1)</script>\n---\n| a | b |"
    model.push_to_hub(REPO)
    text = card_of(hub).text
    assert "<script>" not in text
    assert r"&lt;script&gt;alert\(1\)&lt;/script&gt; --- \| a \| b \|" in text


def test_the_reliability_of_the_blend_is_drawn(hub: Hub, model: Any, cache: Path) -> None:
    model.push_to_hub(REPO)
    assert "reliability.png" not in hub.files(REPO)
    model.measured["reliability"] = [[0.2, 0.1, 5], [0.9, 0.95, 5]]
    model.push_to_hub(REPO)
    assert hub.files(REPO)["reliability.png"].startswith(b"\x89PNG")
    assert "(reliability.png)" in card_of(hub).text
    found = KnnForImageClassification.from_pretrained(REPO, cache_dir=cache)
    assert found.measured == model.measured


def test_a_picture_of_neighbours_is_kept(hub: Hub, model: Any, cache: Path) -> None:
    model.neighbor_picture = b"\x89PNG of neighbours"
    model.push_to_hub(REPO)
    found = KnnForImageClassification.from_pretrained(REPO, cache_dir=cache)
    found.push_to_hub(REPO)
    assert hub.files(REPO)["neighbors.png"] == model.neighbor_picture
    assert "(neighbors.png)" in card_of(hub).text


def test_small_pictures_stay_behind_unless_asked(
    hub: Hub, model: Any, cache: Path, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    import hf_knn_cli

    row = int(model.datastore.ids[0])
    model.keep_thumbnails({row: Image.new("RGB", (300, 200), "red")})
    model.forget([int(model.datastore.ids[1])])
    receipts, small = len(model.changes), model.thumbnails
    said, name = b"small copies of training pictures", "thumbnails.safetensors"
    for asked in (False, True, False):  # the last one takes away what the second brought
        model.push_to_hub(REPO, thumbnails=asked)
        files = assert_whole(hub)
        assert (name in files) == (said in files["README.md"]) == asked
        found = AutoModel.from_pretrained(REPO, cache_dir=cache)
        assert (found.thumbnails is not None) == asked
        assert len(found.changes) == receipts
        assert_answers_alike(found, model)
        assert model.thumbnails is small
    model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id=REPO, thumbnails=True)
    assert name in hub.files(REPO)
    for options, is_there in (["--thumbnails"], True), ([], False):
        done = CliRunner().invoke(hf_knn_cli.app, ["push", str(tmp_path / "model"), REPO, *options])
        assert done.exit_code == 0, done.stderr
        assert (name in hub.files(REPO)) == is_there
        words = "went along" if is_there else "stayed here; --thumbnails"
        assert words in " ".join(done.stdout.split())
    assert (tmp_path / "model" / name).is_file()


def test_a_scanner_of_pickles_finds_nothing(hub: Hub, model: Any, tmp_path: Path) -> None:
    scanner = pytest.importorskip("picklescan.scanner", reason="picklescan is not installed")
    model.push_to_hub(REPO)
    for name, content in hub.files(REPO).items():
        (tmp_path / name).write_bytes(content)
    found = scanner.scan_directory_path(str(tmp_path))
    assert (found.infected_files, found.issues_count) == (0, 0)
    (tmp_path / "bad.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert scanner.scan_directory_path(str(tmp_path)).infected_files == 1


# datastores, commands


def test_a_datastore_has_a_repository_of_its_own(hub: Hub, model: Any, cache: Path) -> None:
    store = model.datastore
    store.push_to_hub("org/rows")
    assert_same_rows(Datastore.from_pretrained("org/rows", cache_dir=cache), store)
    store.remove([int(store.ids[3])])
    store.push_to_hub("org/rows")
    found = Datastore.from_pretrained("org/rows", cache_dir=cache)
    assert_same_rows(found, store)
    blobs = [name for name in hub.files("org/rows") if name.startswith("datastore-")]
    assert len(blobs) == 1
    first = hub.repo("org/rows").history()[-1]
    assert len(first.files) > 1
    model.push_to_hub(REPO)
    assert_same_rows(Datastore.from_pretrained(REPO, cache_dir=cache), model.datastore)
    with pytest.raises(ValueError, match="holds a model"):
        store.push_to_hub(REPO)
    hub.create("org/empty")
    with pytest.raises(FileNotFoundError, match=r"datastore\.json"):
        Datastore.from_pretrained("org/empty", cache_dir=cache)


def test_the_command(hub: Hub, model: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    import hf_knn_cli

    model.save_pretrained(tmp_path / "model")
    runner = CliRunner(env={"COLUMNS": "200"})
    done = runner.invoke(hf_knn_cli.app, ["push", str(tmp_path / "model"), REPO, "--private"])
    assert done.exit_code == 0, done.stderr
    assert "Pushed: http" in done.stdout
    assert hub.repo(REPO).private
    assert_whole(hub)
    wrong = ["push", str(tmp_path / "model"), REPO, "--parent-commit", "0" * 40]
    done = runner.invoke(hf_knn_cli.app, wrong)
    assert done.exit_code == 1
    assert "nothing was overwritten" in " ".join(done.stderr.split())


def test_a_damaged_checkpoint_is_not_pushed(hub: Hub, model: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    import hf_knn_cli

    model.save_pretrained(tmp_path / "model")
    (blob,) = (tmp_path / "model").glob("datastore-*.safetensors")
    content = bytearray(blob.read_bytes())
    content[-3] ^= 1
    blob.write_bytes(content)
    done = CliRunner().invoke(hf_knn_cli.app, ["push", str(tmp_path / "model"), REPO])
    assert done.exit_code == 1
    assert not hub.repos


@pytest.mark.slow
def test_a_process_without_the_package_answers_alike(hub: Hub, model: Any, tmp_path: Path) -> None:
    """Push from here, load there: only transformers and torch, through the Hub."""
    import os

    model.push_to_hub(REPO)
    torch.save(pixels(3, seed=4), tmp_path / "pixels.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['hf_knn'] = sys.modules['faiss'] = None\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({REPO!r}, trust_remote_code=True).eval()\n"
        "torch.set_num_threads(1)\n"
        "with torch.no_grad():\n"
        "    logits = model(pixel_values=torch.load('pixels.pt')).logits\n"
        "torch.save(logits, 'logits.pt')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        wanted = model(pixel_values=pixels(3, seed=4)).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), wanted)


def test_a_model_whose_rows_are_in_milvus_is_pushed_as_a_reference(
    hub: Hub, model: Any, cache: Path, tmp_path: Path
) -> None:
    pytest.importorskip("milvus_lite")
    embedded = model.datastore
    uri = str(tmp_path / "rows.db")
    model.datastore = MilvusDatastore.from_datastore(embedded, uri, "rows", progress=False)
    model.push_to_hub(REPO)
    files = hub.repo(REPO).history()[0].files
    assert "datastore.json" in files
    assert not any(name.startswith("datastore-") for name in files), "no row leaves the server"
    with pytest.raises(ValueError, match="consent to ask a server"):
        AutoModel.from_pretrained(REPO, cache_dir=cache)
    found = AutoModel.from_pretrained(REPO, cache_dir=cache, trust_remote_datastore=True)
    picture = pixels(2)
    with torch.inference_mode():
        answer = found.eval()(pixel_values=picture).logits
        model.datastore = embedded
        assert torch.equal(answer, model.eval()(pixel_values=picture).logits)

"""A model whose datastore has a learned map: saved, opened without the package, changed, named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.stranger import make_site, run
from support.tiny import LABELS, pixels, tiny_model

from hf_knn import Datastore, KnnForImageClassification
from hf_knn.commands.checks import _facts
from hf_knn.core.manifest import DatastoreError
from hf_knn.core.search import normalize_rows
from hf_knn.fit import refit
from hf_knn.fit.metric import Recipe, choose_recipe, train_map
from hf_knn.model.card import make_card
from hf_knn.model.compare import compare
from hf_knn.model.export import GraphModel

WIDTH = 4
HEADS = ["linear", "ridge"]


def mapped_model(head: str = "linear", **options: Any) -> KnnForImageClassification:
    model = tiny_model(head=head, **options)
    store = model.datastore
    assert isinstance(store, Datastore)
    give_map(model)
    return model


def give_map(model: KnnForImageClassification, seed: int = 9) -> None:
    store = model.datastore
    assert isinstance(store, Datastore)
    generator = torch.Generator().manual_seed(seed)
    store.remap(torch.randn(WIDTH, store.dim, generator=generator))
    model.config.learned_metric = True


def answers(model: KnnForImageClassification) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        out = model(pixel_values=pixels(6, 3), return_neighbors=True)
    assert out.neighbors is not None
    return {"logits": out.logits, **out.neighbors._asdict()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert different == []


def test_it_changes_the_neighbours_and_is_saved(tmp_path: Path) -> None:
    model = mapped_model()
    wanted = answers(model)
    assert not torch.equal(wanted["ids"], answers(tiny_model())["ids"])
    model.save_pretrained(tmp_path)
    opened = KnnForImageClassification.from_pretrained(tmp_path)
    assert opened.config.learned_metric
    assert_same(answers(opened), wanted)
    opened.save_pretrained(tmp_path)  # over itself: nothing is lost
    assert_same(answers(KnnForImageClassification.from_pretrained(tmp_path)), wanted)


STRANGER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = AutoModel.from_pretrained(folder / "mapped", trust_remote_code=True)
model.save_pretrained(folder / "again")
again = AutoModel.from_pretrained(folder / "again", trust_remote_code=True)
with torch.no_grad():
    out = again(pixel_values=load_file(folder / "pixels.st")["pixels"], return_neighbors=True)
found = {"logits": out.logits, **out.neighbors._asdict()}
save_file({name: value.contiguous() for name, value in found.items()}, folder / "answers.st")
def said(change):
    import shutil
    broken = folder / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(folder / "mapped", broken)
    change(broken)
    try:
        AutoModel.from_pretrained(broken, trust_remote_code=True)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
def later(broken):
    values = json.loads((broken / "datastore.json").read_text()) | {"format_version": 3}
    (broken / "datastore.json").write_text(json.dumps(values))
print(json.dumps({"module": type(again).__module__, "later": said(later)}))
"""


@pytest.mark.slow
def test_the_code_that_travels_answers_with_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, home = mapped_model(), tmp_path / "home"
    home.mkdir()
    model.save_pretrained(tmp_path / "mapped")
    save_file({"pixels": pixels(6, 3)}, tmp_path / "pixels.st")
    report = run(STRANGER, tmp_path, site=make_site(tmp_path / "site"), home=home)
    assert report["module"].startswith("transformers_modules.")
    assert "format version 2, but got version 3; upgrade" in report["later"]
    with torch.no_grad():
        out = model(pixel_values=pixels(6, 3), return_neighbors=True)
    assert out.neighbors is not None
    assert_same(
        load_file(tmp_path / "answers.st"), {"logits": out.logits, **out.neighbors._asdict()}
    )
    opened = KnnForImageClassification.from_pretrained(tmp_path / "again")
    assert_same(answers(opened), answers(model))


def test_the_fingerprint_is_another_one_with_another_map() -> None:
    model = tiny_model()
    found = [model.fingerprint_rows()]
    for seed in (1, 2):
        give_map(model, seed)
        found.append(model.fingerprint_rows())
    assert len(set(found)) == 3
    give_map(model, 1)
    assert model.fingerprint_rows() == found[1]


@pytest.mark.parametrize("head", HEADS)
def test_teach_forget_and_undo_go_on_with_it(head: str, tmp_path: Path) -> None:
    model = mapped_model(head)
    store = model.datastore
    assert isinstance(store, Datastore)
    before, state = answers(model), model.fingerprint_rows()
    assert store.learned_map is not None
    weight = store.learned_map.weight
    model.teach(pixels(3, 50), ["ant", "bee", "new"])
    receipt = model.forget(ids=model.changes[-1].ids)
    said = [note for note in receipt.notes if note.startswith("what was learned")]
    assert said == [
        "what was learned about likeness (--learn-metric) stays as it was, and holds a trace of "
        "the "
        "rows; a training makes it anew, or `hf-knn refit` with the heads ridge, kernel and lda"
    ]
    model.undo()
    model.undo()
    assert model.fingerprint_rows() == state
    torch.testing.assert_close(answers(model)["logits"], before["logits"], rtol=0, atol=1e-5)
    model.forget(label="cat", recenter=True)
    model.undo()
    assert_same({k: v for k, v in answers(model).items() if k != "logits"},
                {k: v for k, v in before.items() if k != "logits"})  # fmt: skip
    model.save_pretrained(tmp_path)
    opened = KnnForImageClassification.from_pretrained(tmp_path).datastore
    assert opened is not None
    assert torch.equal(opened.learned_map.weight, weight)


def test_refit_leaves_no_trace_of_what_was_forgotten() -> None:
    model = mapped_model("ridge")
    model.forget(label="cat")
    refit(model)
    store = model.datastore
    assert isinstance(store, Datastore)
    fresh = Datastore.from_features(store.features, store.labels, store.ids, index="flat")
    wanted = train_map(fresh, choose_recipe(fresh, 0), 0)
    assert store.learned_map is not None
    assert torch.equal(store.learned_map.weight, wanted)
    assert torch.equal(store.mean, fresh.mean)


def test_a_plain_model_s_receipt_names_no_map() -> None:
    receipt = tiny_model().forget(label="cat")
    assert not [note for note in receipt.notes if "learned map" in note]


def test_a_merge_with_another_map_is_refused() -> None:
    model, other = mapped_model(), tiny_model()
    give_map(other, 1)
    assert other.datastore is not None
    state = model.fingerprint_rows()
    with pytest.raises(ValueError, match="Expected both to have learned_map"):
        model.merge(other.datastore)
    assert model.fingerprint_rows() == state


@pytest.mark.parametrize("says", [True, False])
def test_configuration_and_datastore_must_agree(says: bool, tmp_path: Path) -> None:
    model = tiny_model() if says else mapped_model()
    model.config.learned_metric = says
    with pytest.raises(
        ValueError, match=f"learned_metric {says}, as the model has, but got {not says}"
    ):
        model.save_pretrained(tmp_path)


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    mapped_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"learned_metric": true', '"k": 3')
    )
    with pytest.raises(DatastoreError, match=r"config\.json"):
        KnnForImageClassification.from_pretrained(tmp_path)


def test_it_is_said(tmp_path: Path) -> None:
    model = mapped_model()
    store = model.datastore
    assert store is not None
    said = f"{store.dim} → {WIDTH}"
    assert f"learned metric ({said} values)" in make_card(model, "mine")
    assert _facts(model, store)["learned metric"] == said
    assert compare(tiny_model(), model).settings["learned_metric"] == (False, True)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["learned_metric"] is True
    assert f"learned metric ({said} values)" in (tmp_path / "README.md").read_text()
    assert "learned metric" not in make_card(tiny_model(), "mine")


def test_reasons_are_of_mapped_rows_and_p_values_are_not() -> None:
    model = mapped_model()
    store = model.datastore
    assert isinstance(store, Datastore)
    with torch.no_grad():
        features = model(pixel_values=pixels(1, 3)).pooler_output
    mean = store.mean.double().numpy()
    rows = normalize_rows(store.features.numpy(), mean, store.normalization, store.learned_map)
    query = normalize_rows(features.numpy(), mean, store.normalization, store.learned_map)[0]
    near = rows @ query
    plain = normalize_rows(store.features.numpy(), mean, store.normalization)
    others = plain @ plain.T
    others[range(len(rows)), range(len(rows))] = -2
    nearest = (plain @ normalize_rows(features.numpy(), mean, store.normalization)[0]).max()
    as_far = int((others.max(1) <= nearest + 1e-9).sum())
    explained = model.explain(features=features)
    assert isinstance(explained, list)
    found = explained[0]
    assert found.neighbors[0].row_id == int(store.ids[near.argmax()])
    assert found.neighbors[0].similarity == pytest.approx(near.max(), abs=1e-6)
    assert found.typicality == pytest.approx((1 + as_far) / (1 + len(rows)))
    assert len(LABELS) == model.config.classes


def test_p_values_stay_valid_behind_a_map_that_knows_its_rows() -> None:
    """New rows of the same kind: a fifth of them, more or less, has a p-value below a fifth."""
    model, generator = tiny_model(rows=0), torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 4
    rows = torch.randn(600, model.config.feature_dim, generator=generator)
    rows[:, 0] += labels
    store = Datastore.from_features(rows[:300], labels[:300], index="flat")
    store.remap(train_map(store, Recipe(0.3, 30), 0))
    model.datastore = store
    model.config.learned_metric = True
    found = model.explain(features=rows[300:])
    assert isinstance(found, list)
    low = [one.typicality for one in found if one.typicality is not None and one.typicality < 0.2]
    assert 0.14 < len(low) / 300 < 0.26
    assert len(found) == 300


def test_the_graph_to_be_exported_maps_too() -> None:
    model = mapped_model()
    with torch.no_grad():
        log_probs, _, ids, _ = GraphModel(model)(pixels(6, 3))
    wanted = answers(model)
    torch.testing.assert_close(log_probs, wanted["logits"], rtol=0, atol=1e-3)
    assert torch.equal(ids[:, :5], wanted["ids"][:, :5])

"""A processor pushed beside a model that was saved without one: a common habit, no staleness."""

from pathlib import Path

import pytest
import torch
from support.tiny import pixels, processor, tiny_model, tiny_store

from hf_knn import KnnForImageClassification
from hf_knn.core import model as core
from hf_knn.core.manifest import DatastoreError, Manifest, StaleDatastoreError

CLASSES = [KnnForImageClassification, core.KnnForImageClassification]
SAYS_SO = "beside a datastore saved without one"


@pytest.fixture
def model() -> KnnForImageClassification:
    model = tiny_model()
    model.image_processor = None
    model.datastore = tiny_store(model)
    return model


@pytest.fixture
def folder(model: KnnForImageClassification, tmp_path: Path) -> Path:
    """As the two pushes of model and processor leave it."""
    model.save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("opener", CLASSES)
def test_it_is_opened_with_a_warning(
    opener: type[core.KnnForImageClassification], model: KnnForImageClassification, folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    found = opener.from_pretrained(folder)
    assert SAYS_SO in caplog.text
    assert found.image_processor is not None
    with torch.inference_mode():
        wanted = model.eval()(pixel_values=pixels(3))
        assert torch.equal(found(pixel_values=pixels(3)).logits, wanted.logits)


@pytest.mark.parametrize("opener", CLASSES)
def test_saved_again_it_belongs_to_the_datastore(
    opener: type[core.KnnForImageClassification], folder: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    opener.from_pretrained(folder).save_pretrained(tmp_path / "again")
    binding = Manifest.read(tmp_path / "again" / "datastore.json").binding
    assert binding is not None
    assert binding.processor
    assert "stale" not in caplog.text
    caplog.clear()
    for each in CLASSES:
        assert each.from_pretrained(tmp_path / "again").datastore is not None
    assert SAYS_SO not in caplog.text
    other = processor()
    other.image_mean = [0.1, 0.2, 0.3]
    other.save_pretrained(tmp_path / "again")
    for each in CLASSES:
        with pytest.raises(StaleDatastoreError, match="processor settings"):
            each.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("opener", CLASSES)
def test_other_weights_stay_stale_beside_it(
    opener: type[core.KnnForImageClassification], folder: Path, tmp_path: Path
) -> None:
    other = tiny_model(seed=5)
    other.image_processor = None
    other.save_pretrained(tmp_path / "other")
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises((StaleDatastoreError, DatastoreError), match="other weights"):
        opener.from_pretrained(folder)
    forced = opener.from_pretrained(folder, allow_stale=True)
    forced.save_pretrained(tmp_path / "forced")
    with pytest.raises(StaleDatastoreError, match="weights"):
        opener.from_pretrained(tmp_path / "forced")


def test_a_model_saved_with_one_is_not_opened_with_another(
    model: KnnForImageClassification, tmp_path: Path
) -> None:
    model.image_processor = processor()
    model.datastore = tiny_store(model)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    for each in CLASSES:
        with pytest.raises(StaleDatastoreError, match="processor settings"):
            each.from_pretrained(tmp_path / "model")

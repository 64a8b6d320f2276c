"""`KnnTrainer.report`: what it takes, and where its pictures come from."""

from pathlib import Path
from typing import Any

import pytest
from support.pictures import NAMES, dataset_of
from support.tiny import tiny_model

from hf_knn import KnnTrainer, KnnTrainingArguments, extract_features
from hf_knn.fit import Report

LABELS = [0, 1, 2, 3, 4] * 4


def mislabelled(labels: list[int], seed: int) -> Any:
    """Pictures of which each third has the label of another class."""
    rows = dataset_of(labels, seed)
    given = [(label + (row % 3 == 0)) % 5 for row, label in enumerate(labels)]
    kind = rows.features["label"]
    return rows.remove_columns("label").add_column("label", given).cast_column("label", kind)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> KnnTrainer:
    model = tiny_model("vit", list(NAMES), rows=0, k=5)
    args = KnnTrainingArguments(
        str(tmp_path_factory.mktemp("out")), freeze_backbone=True, num_train_epochs=1,
        disable_tqdm=True, report_to=[],
    )  # fmt: skip
    trainer = KnnTrainer(
        model, args, train_dataset=dataset_of(LABELS), eval_dataset=mislabelled(LABELS, 2)
    )
    trainer.train()
    return trainer


def test_it_reports_on_its_own_pictures_or_on_others(trainer: KnnTrainer, tmp_path: Path) -> None:
    report, metrics = trainer.report(), trainer.evaluate()
    assert isinstance(report, Report)
    assert report.count == len(LABELS)
    for name, value in report.metrics.items():
        assert metrics[name] == pytest.approx(value, nan_ok=True)
    other = trainer.report(dataset_of([0, 1, 2], 5))
    assert other.count == 3
    assert report.notes == other.notes == ()
    report.save(tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    shown = len(report.wrong) + sum(len(each.neighbors) for each in report.wrong)
    assert page.count("<img ") == 1 + shown > 10
    assert "not at hand" not in page


def test_what_was_chosen_on_the_same_pictures_is_said(trainer: KnnTrainer) -> None:
    trainer.tune(criterion="accuracy")
    assert trainer.report().notes == ("k, temperature and λ were chosen on the same pictures.",)
    assert trainer.report(dataset_of([0, 1, 2], 5)).notes == ()


def test_features_show_pictures_that_are_given(trainer: KnnTrainer, tmp_path: Path) -> None:
    dataset = mislabelled(LABELS, 3)
    rows = extract_features(trainer.model, dataset, use_cache=False, progress=False)
    report = trainer.report(rows)
    report.save(tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    count = len(report.wrong)
    assert f"Pictures that are not at hand here: {count} of {count}." in page
    pictures = {row: dataset[row]["image"] for row in range(len(dataset))}
    trainer.report(rows, pictures=pictures).save(tmp_path)
    assert "not at hand" not in (tmp_path / "report.html").read_text("utf-8")


def test_one_of_several_sets_is_named(trainer: KnnTrainer) -> None:
    args = trainer.args
    sets: Any = {"day": dataset_of([0, 1], 5), "night": dataset_of([2, 3, 4], 6)}
    several = KnnTrainer(trainer.model, args, eval_dataset=sets)
    assert several.report("night").count == 3
    for wrong in (None, "dusk"):
        with pytest.raises(ValueError, match="one set of labelled pictures"):
            several.report(wrong)
    with pytest.raises(ValueError, match="but got None"):
        KnnTrainer(trainer.model, args).report()
    with pytest.raises(ValueError, match="labels below 5"):
        several.report(rows_beyond(trainer))


def rows_beyond(trainer: KnnTrainer) -> Any:
    rows = extract_features(trainer.model, dataset_of([0, 1]), use_cache=False, progress=False)
    rows.labels[0] = 5
    return rows

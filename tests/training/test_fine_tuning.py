"""Fine-tuning with a datastore: refreshes, loss factors, augmentation, frozen blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from support.oracles import similarity_matrix, vote_probs
from support.tiny import tiny_backbone
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2
from transformers import BitImageProcessor

from hf_knn import KnnTrainer, KnnTrainingArguments, extract_features
from hf_knn.data.augmentation import Augment, EpochRows
from hf_knn.data.loading import prepare
from hf_knn.fit.voices import OwnVotes
from hf_knn.fit.weights import class_weights
from hf_knn.model.backbones import freeze_all_but_last
from hf_knn.training.checkpoints import newest_whole
from training.test_resume import CLASSES, make_trainer, noisy_rows, outcome


class Spied(KnnTrainer):
    """Remembers each batch, what the head said, and the loss."""

    seen: list[tuple[dict[str, Tensor], Tensor, float]]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        given = dict(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, *args[1:])
        self.seen.append((given, outputs.head_logits.detach(), float(loss.detach())))
        return loss


def spied(folder: Path, family: str = "vit", **options: Any) -> Spied:
    trainer = make_trainer(folder, family, save_strategy="no", **options)
    trainer.__class__ = Spied
    assert isinstance(trainer, Spied)
    trainer.seen = []
    return trainer


def stay_in_evaluation_mode(trainer: KnnTrainer) -> None:
    """Batch norm in training mode would make features that depend on the batch."""
    backbone = trainer.model.backbone
    backbone.train = lambda mode=True: backbone  # type: ignore[method-assign]


def own_p(trainer: KnnTrainer, votes: OwnVotes) -> dict[int, float]:
    """Leave-one-out p_knn by sample id, by brute force over the datastore that was asked."""
    store, features = trainer.loss.store, trainer.train_features
    assert store is not None
    assert features is not None
    similarities = similarity_matrix(store, features.features)
    found = {}
    for row, number in enumerate(features.ids.tolist()):
        others = [other for other in range(len(features)) if other != row]
        others.sort(key=lambda other: (-similarities[row, other], other))
        nearest = others[: votes.k]
        distances = (2 - 2 * similarities[row : row + 1, nearest]).clip(0)
        labels = features.labels[nearest].numpy()[None]
        p = vote_probs(distances, labels, 3, "softmax", votes.temperature)
        found[number] = float(p[0, features.labels[row]])
    return found


@pytest.mark.parametrize("queries", ["snapshot", "live"])
@pytest.mark.parametrize(
    "options",
    [
        {"knn_loss_alpha": 0.7, "knn_loss_clamp": 2.0},
        {"knn_loss_alpha": 0.7, "knn_loss_normalize": "mean", "class_weights": "inverse"},
        {"knn_loss_alpha": 0.0, "knn_loss_gamma": 2.0},
        {"knn_loss_alpha": 0.3, "knn_loss_gamma": 0.5, "label_smoothing_factor": 0.1},
    ],
)
def test_the_loss_of_a_step_by_hand(queries: str, options: dict[str, Any], tmp_path: Path) -> None:
    """With one refresh and no learning, live features are those of the snapshot."""
    trainer = spied(
        tmp_path, "resnet", learning_rate=0.0, num_train_epochs=1, augmentation="none",
        knn_queries=queries, **options,
    )  # fmt: skip
    # batch norm in training mode makes other features: live ones are compared in evaluation mode
    stay_in_evaluation_mode(trainer)
    trainer.train()
    votes = trainer.loss.votes
    assert votes is not None
    p = own_p(trainer, votes)
    alpha, gamma = trainer.args.knn_loss_alpha, trainer.args.knn_loss_gamma
    clamp, smoothing = trainer.args.knn_loss_clamp, trainer.args.label_smoothing_factor

    def factor(number: int) -> float:
        surprise = min(-np.log(max(p[number], 1e-300)), clamp)
        return (1 + alpha * surprise) * (1 - p[number]) ** gamma

    mean = float(np.mean([factor(number) for number in p]))
    labels = torch.tensor(noisy_rows(24)["label"][:])
    weights = class_weights(labels, 3, options.get("class_weights", "none"))
    assert len({round(factor(number), 3) for number in p}) > 5
    for inputs, logits, loss in trainer.seen:
        losses = cross_entropy(
            logits, inputs["labels"], reduction="none", label_smoothing=smoothing
        )
        factors = torch.tensor([factor(number) for number in inputs["sample_ids"].tolist()])
        if "knn_loss_normalize" in options:
            factors = factors / mean
        wanted = (losses * factors * weights[inputs["labels"]]).mean()
        assert loss == pytest.approx(float(wanted), rel=2e-3)


def test_live_queries_see_the_features_of_the_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"knn_refresh": "never", "num_train_epochs": 2}
    weights = []
    for queries in ("snapshot", "live"):
        trainer = make_trainer(tmp_path / queries, knn_queries=queries, **options)
        trainer.train()
        weights.append(outcome(trainer)["head.classifier.weight"])
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("schedule", "steps"), [("epoch", [0, 3, 6]), ("never", [0]), ("4", [0, 4, 8])]
)
def test_the_datastore_is_rebuilt_on_its_schedule(
    schedule: str, steps: list[int], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, knn_refresh=schedule, save_strategy="no")
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "knn_refresh_seconds" in entry]
    assert [entry["step"] for entry in logged] == steps
    assert all(entry["knn_refresh_seconds"] > 0 for entry in logged)
    assert len({entry["knn_mean_p"] for entry in logged}) == len(steps)


def test_k_and_temperature_of_the_loss_are_chosen_anew_if_asked(tmp_path: Path) -> None:
    cells = []
    for anew in (False, True):
        trainer = make_trainer(
            tmp_path / str(anew), knn_refresh="1", knn_refresh_tune=anew, save_strategy="no"
        )
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "knn_loss_k" in entry]
        cells.append({(entry["knn_loss_k"], entry["knn_loss_temperature"]) for entry in logged})
    assert len(cells[0]) == 1
    assert len(cells[1]) > 1


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_refresh_moves_nothing_but_the_datastore(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, family)
    trainer.model.train()
    before, numbers = outcome(trainer), torch.get_rng_state()
    trainer._refresh()
    assert all(torch.equal(outcome(trainer)[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert trainer.model.training
    assert all(module.training for module in trainer.model.backbone.modules())


def test_factors_do_not_depend_on_the_size_of_a_batch(tmp_path: Path) -> None:
    """Four pictures twice, or eight at once: the same step, up to the order of sums."""
    found = []
    for batch, parts in ((8, 1), (4, 2)):
        trainer = make_trainer(
            tmp_path / str(batch), "resnet", per_device_train_batch_size=batch,
            gradient_accumulation_steps=parts, knn_loss_normalize="mean", trainable_blocks=1,
            save_strategy="no", max_steps=1, optim="sgd", augmentation="none",
        )  # fmt: skip
        stay_in_evaluation_mode(trainer)
        trainer.train()
        found.append(outcome(trainer))
    name = "head.classifier.weight"
    torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_pictures(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_steps=1)
    real, calls = trainer.loss.factors, []

    def poisoned(surprise: Tensor) -> Tensor:
        calls.append(len(surprise))
        return real(surprise) * (torch.nan if len(calls) == 6 else 1.0)

    trainer.loss.factors = poisoned  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"at step \d, sample ids \[\d+, .*is whole"):
        trainer.train()
    assert all(value.isfinite().all() for value in outcome(trainer).values())
    newest, skipped = newest_whole(tmp_path / "run")
    assert newest is not None
    assert not skipped


# blocks


@pytest.mark.parametrize("family", ["vit", "resnet", "swin", "convnext", "dinov2", "timm_vit"])
def test_only_the_last_blocks_are_trained(family: str) -> None:
    backbone = tiny_backbone(family)
    freeze_all_but_last(backbone, 1)
    flags = [parameter.requires_grad for parameter in backbone.parameters()]
    assert flags == sorted(flags)  # frozen first
    assert any(flags)
    assert not all(flags)
    few = sum(flags)
    freeze_all_but_last(backbone, 2)
    assert sum(parameter.requires_grad for parameter in backbone.parameters()) > few
    with pytest.raises(ValueError, match=r"`trainable_blocks` to be in \[1, \d+\], but got 99"):
        freeze_all_but_last(backbone, 99)


def test_frozen_blocks_do_not_move_nor_do_their_statistics(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "resnet", trainable_blocks=1, save_strategy="no")
    before = outcome(trainer)
    trainer.train()
    after = outcome(trainer)
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert any("stages.1" in name and "running_mean" in name for name in moved)
    assert not [name for name in moved if "stages.0" in name or "embedder" in name]
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())  # as before


# augmentation


def coloured(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def crop_processor() -> BitImageProcessor:
    return BitImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, resample=3
    )


def test_a_picture_is_a_function_of_seed_epoch_and_sample() -> None:
    augment = Augment.from_processor("paper", crop_processor(), 0)
    other = Augment.from_processor("paper", crop_processor(), 1)
    assert augment is not None
    assert other is not None
    picture = coloured(60, 48)
    first = np.asarray(augment(picture, 0, 5))
    assert first.shape == (32, 32, 3)
    torch.manual_seed(9)
    assert np.array_equal(np.asarray(augment(picture, 0, 5)), first)
    for changed in (augment(picture, 1, 5), augment(picture, 0, 6), other(picture, 0, 5)):
        assert not np.array_equal(np.asarray(changed), first)
    state = torch.get_rng_state()
    augment(picture, 3, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_recipe_keeps_what_the_processor_would_see() -> None:
    """Some crop is the centre crop of evaluation, up to the flip and one pixel of rounding."""
    processor = crop_processor()
    augment = Augment.from_processor("paper", processor, 0)
    assert augment is not None
    picture = coloured(36, 36)
    wanted = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    crops = [augment(picture, 0, number) for number in range(200)]
    found = processor(images=crops, return_tensors="pt", **augment.processor_options)
    gaps = (found["pixel_values"] - wanted).abs().amax(dim=(1, 2, 3))
    assert float(gaps.min()) < 1e-5
    assert float(gaps.max()) > 0.5


def test_small_pictures_and_other_shapes_are_cropped_too() -> None:
    augment = Augment.from_processor("paper", crop_processor(), 0)
    assert augment is not None
    for size in ((1, 1), (3, 200), (200, 3)):
        assert augment(coloured(*size), 0, 0).size == (32, 32)


def test_half_of_the_pictures_are_flipped() -> None:
    augment = Augment.from_processor("flip", crop_processor(), 0)
    assert augment is not None
    picture = coloured(8, 8)
    flipped = [augment(picture, 0, number) != picture for number in range(400)]
    assert 150 < sum(flipped) < 250


def test_rows_tell_the_epoch_and_their_pictures_change_with_it(tmp_path: Path) -> None:
    trainer = spied(tmp_path, num_train_epochs=3, learning_rate=0.0, knn_loss_alpha=0.0)
    trainer.train()
    pictures: dict[int, list[Tensor]] = {}
    for inputs, _, _ in trainer.seen:
        for number, pixels in zip(
            inputs["sample_ids"].tolist(), inputs["pixel_values"], strict=True
        ):
            pictures.setdefault(number, []).append(pixels)
    assert len(pictures) == 24
    assert all(len(views) == 3 for views in pictures.values())
    changed = sum(not torch.equal(views[0], views[1]) for views in pictures.values())
    assert changed > 12


def test_stored_and_measured_pictures_are_never_augmented(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_strategy="no", held_out=noisy_rows(9, 1))
    trainer.train()
    store = trainer.model.datastore
    assert store is not None
    plain = extract_features(trainer.model, noisy_rows(24), trainer.processing_class)
    assert torch.equal(store.features.float(), plain.features.half().float())
    assert trainer.evaluate().keys() >= {"eval_knn_top1", "eval_head_top1"}


def test_a_transform_of_the_users_own(tmp_path: Path) -> None:
    rows = noisy_rows(24)
    args = KnnTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    model = make_trainer(tmp_path).model
    trainer = KnnTrainer(
        model, args, train_dataset=rows, train_transform=v2.ColorJitter(brightness=0.5)
    )
    assert isinstance(trainer.train_dataset, EpochRows)
    first, again, later = (
        trainer.data_collator([row])["pixel_values"]
        for row in (
            trainer.train_dataset[0], trainer.train_dataset[0],
            {**trainer.train_dataset[0], "epoch": 1},
        )
    )  # fmt: skip
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_epoch_rows_are_rows() -> None:
    data: Dataset = prepare(noisy_rows(5), CLASSES)
    rows = EpochRows(data)
    assert len(rows) == 5
    assert rows[2]["epoch"] == 0
    rows.set_epoch(4)
    assert rows[2]["epoch"] == 4
    assert rows[2]["sample_id"] == 2

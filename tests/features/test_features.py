"""Features against a loop by hand, and a cache that is never wrong, only faster."""

import copy
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, concatenate_datasets
from datasets import Image as ImageColumn
from PIL import Image
from support.pictures import (
    NAMES,
    dataset_of,
    encoded,
    picture,
    small_backbone,
    small_model,
    small_processor,
    small_resnet,
    write_folder,
)
from torch import Tensor, nn
from transformers import AutoModel, ViTConfig

from hf_knn import extract_features
from hf_knn.data.batches import content_of
from hf_knn.data.loading import load_splits, prepare
from hf_knn.data.places import fingerprint_of
from hf_knn.features import cache as cache_module
from hf_knn.features import extract as features_module
from hf_knn.features.extract import ImageFeatures
from hf_knn.store.folders import cache_root

SIZES = [(8, 8), (31, 9), (5, 20), (1, 1)]
LABELS = [2, 0, 1, 1, 0, 2, 0, 1, 2, 2, 0]
RAW = "not a picture in one of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, HEIF"


def run(model: Any, rows: Any, processor: Any = None, **options: Any) -> ImageFeatures:
    return extract_features(model, rows, processor, progress=False, **options)


def by_hand(backbone: Any, rows: Dataset, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """One picture at a time: Pillow, the processor, the backbone, the pooling."""
    found = []
    for entry in rows[:]["image"]:
        image = entry.convert("RGB") if isinstance(entry, Image.Image) else None
        assert image is not None
        pixel_values = small_processor()(images=[image], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            hidden = backbone(pixel_values=pixel_values).last_hidden_state
        found.append(pool(hidden)[0])
    return torch.stack(found)


def cls(hidden: Tensor) -> Tensor:
    return hidden[:, 0]


def mean(hidden: Tensor) -> Tensor:
    return hidden[:, 1:].mean(dim=1)


@contextmanager
def counting(module: nn.Module) -> Iterator[list[int]]:
    """The number of pictures in each forward pass of a backbone."""
    batches: list[int] = []

    def count(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        batches.append(len(kwargs["pixel_values"]))

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield batches
    finally:
        handle.remove()


# values


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_equals_a_loop_by_hand(batch_size: int) -> None:
    backbone, rows = small_backbone(), dataset_of(LABELS, sizes=SIZES)
    for pooling, pool in {"cls": cls, "mean": mean}.items():
        found = run(backbone, rows, small_processor(), pooling=pooling, batch_size=batch_size)
        wanted = by_hand(backbone, rows, pool)
        assert found.features.dtype == torch.float32
        torch.testing.assert_close(found.features, wanted, rtol=1e-5, atol=1e-5)
        assert wanted.std(dim=0).min() > 1e-3  # the rows differ, so their order was compared


def test_a_knn_model_uses_its_own_poolings_and_processor() -> None:
    rows = dataset_of(LABELS)
    model = small_model(knn_pooling="mean")
    found = run(model, rows)
    assert found.features.shape == (len(LABELS), 32)
    hidden = [by_hand(model.backbone, rows, pool) for pool in (cls, mean)]
    torch.testing.assert_close(found.features, torch.cat(hidden, dim=1), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no `pooling`"):
        run(model, rows, pooling="mean")


def test_the_default_pooling_is_that_of_from_backbone() -> None:
    rows = dataset_of(LABELS)
    wanted = run(small_backbone(), rows, small_processor(), pooling="cls").features
    assert torch.equal(run(small_backbone(), rows, small_processor()).features, wanted)


def test_labels_ids_names_and_paths_are_aligned() -> None:
    found = run(small_model(), dataset_of(LABELS))
    assert found.labels.tolist() == LABELS
    assert found.ids.tolist() == list(range(len(LABELS)))
    assert found.label_names == list(NAMES)
    assert found.paths == [f"{NAMES[label]}/{row}.png" for row, label in enumerate(LABELS)]
    assert found.labels.dtype == found.ids.dtype == torch.int64
    assert (found.skipped, found.computed, len(found)) == ([], len(LABELS), len(LABELS))
    assert found.seconds > 0
    assert found.knn_log_probs is None


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_picture_has_its_print(use_cache: bool) -> None:
    labels = [0, 1, 2, 0]
    rows = concatenate_datasets([dataset_of(labels), dataset_of(labels[:2])])
    wanted = [content_of(picture(label, row)) for row, label in enumerate(labels)]
    for computed in (4 if use_cache else 6, 0 if use_cache else 6):
        found = run(small_model(), rows, use_cache=use_cache)
        assert found.computed == computed
        assert found.contents is not None
        assert [row.numpy().tobytes() for row in found.contents] == wanted + wanted[:2]
    some = found.select([3, 1])
    assert some.contents is not None
    assert [row.numpy().tobytes() for row in some.contents] == [wanted[3], wanted[1]]


def test_rows_come_in_the_order_of_the_dataset() -> None:
    model, rows = small_model(), prepare(dataset_of(LABELS))
    straight, mixed = run(model, rows), run(model, rows.shuffle(seed=2))
    order = mixed.ids
    assert order.tolist() != straight.ids.tolist()
    torch.testing.assert_close(mixed.features, straight.features[order], rtol=1e-5, atol=1e-5)
    assert torch.equal(mixed.labels, straight.labels[order])
    assert mixed.paths == [straight.paths[row] for row in order.tolist()]


def test_bf16_is_close_and_stays_float32() -> None:
    model, rows = small_model(), dataset_of(LABELS)
    exact, rough = run(model, rows).features, run(model, rows, precision="bf16").features
    assert rough.dtype == torch.float32
    gap = (exact - rough).abs().max() / exact.abs().max()
    assert 0 < gap < 0.03


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_precision_that_is_emulated_is_said(
    is_fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(features_module, "has_fast_bfloat16", lambda: is_fast)
    for precision in ("fp32", "bf16"):
        run(small_model(), dataset_of(LABELS), precision=precision)
    assert [("bf16, so that it is emulated" in line) for line in caplog.messages] == (
        [] if is_fast else [True]
    )


def test_a_model_in_bfloat16() -> None:
    model, rows = small_model(), dataset_of(LABELS)
    exact = run(model, rows).features
    model.bfloat16()
    found = run(model, rows)
    assert found.computed == len(LABELS)  # other weights
    assert found.features.dtype == torch.float32
    assert (exact - found.features).abs().max() / exact.abs().max() < 0.03


def test_features_can_be_trained_on() -> None:
    model = small_model()
    found = run(model, dataset_of(LABELS))
    assert not found.features.requires_grad
    assert not found.features.is_inference()
    model.head(found.features).sum().backward()
    assert model.head.classifier.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


# the model is left as it was


def test_train_mode_and_batch_norm_statistics_are_left_alone() -> None:
    backbone, rows = small_resnet(), dataset_of(LABELS)
    processor = small_processor()
    wanted = run(backbone, rows, processor, use_cache=False).features
    for training in (True, False):
        backbone.train(training)
        before = copy.deepcopy(backbone.state_dict())
        assert any(name.endswith("running_mean") for name in before)
        found = run(backbone, rows, processor, use_cache=False, batch_size=3)
        torch.testing.assert_close(found.features, wanted, rtol=1e-4, atol=1e-5)
        assert all(module.training is training for module in backbone.modules())
        after = backbone.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_mode_of_each_submodule_is_left_alone() -> None:
    model = small_model()
    model.backbone.train()
    frozen = [module for module in model.backbone.modules() if isinstance(module, nn.LayerNorm)]
    for module in frozen:
        module.eval()
    run(model, dataset_of(LABELS), use_cache=False)
    assert frozen
    assert not any(module.training for module in frozen)


def test_the_mode_comes_back_after_an_error() -> None:
    model = small_model()
    model.backbone.train()
    with interrupted(model.backbone, 0), pytest.raises(Interrupted):
        run(model, dataset_of(LABELS))
    assert model.backbone.training


# the cache


def test_the_second_run_computes_nothing(knn_cache: Path) -> None:
    model, rows = small_model(), dataset_of(LABELS)
    first = run(model, rows, batch_size=4)
    assert list(knn_cache.rglob("*.safetensors"))
    with counting(model.backbone) as batches:
        again = run(copy.deepcopy(model), dataset_of(LABELS), batch_size=3)
        same = run(model, rows)
    assert batches == []
    for other in (again, same):
        assert (other.computed, other.seconds) == (0, 0.0)
        assert torch.equal(other.features, first.features)
        assert torch.equal(other.labels, first.labels)
        assert torch.equal(other.ids, first.ids)
        assert other.paths == first.paths


def other_weights(model: Any) -> Any:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(changed.backbone.parameters())[..., 0] += 1e-3
    return changed


def other_activation(model: Any) -> Any:
    config = ViTConfig(**model.backbone.config.to_dict() | {"hidden_act": "relu"})
    backbone = AutoModel.from_config(config, add_pooling_layer=False)
    backbone.load_state_dict(model.backbone.state_dict())
    return small_model(backbone=backbone.eval())


VARIANTS: dict[str, Callable[[Any, Any], tuple[Any, Any, dict[str, Any]]]] = {
    "weights": lambda m, d: (other_weights(m), d, {}),
    "pooling": lambda m, d: (small_model(pooling="mean"), d, {}),
    "poolings": lambda m, d: (small_model(knn_pooling="mean"), d, {}),
    "mean": lambda m, d: (m, d, {"processing_class": small_processor(image_mean=[0.4] * 3)}),
    "resize": lambda m, d: (m, d, {"processing_class": small_processor(resample=0)}),
    "precision": lambda m, d: (m, d, {"precision": "bf16"}),
    "pictures": lambda m, d: (m, dataset_of(LABELS, seed=1, sizes=SIZES), {}),
    "activation": lambda m, d: (other_activation(m), d, {}),
}
"""What must not be answered from the cache of the plain run."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
        )
        for name in VARIANTS
    ],
)
def test_anything_else_is_computed_again(name: str) -> None:
    rows = dataset_of(LABELS, sizes=SIZES)
    plain = run(small_model(), rows)
    model, other, options = VARIANTS[name](small_model(), rows)
    truth = extract_features(model, other, use_cache=False, progress=False, **options)
    found = extract_features(model, other, progress=False, **options)
    assert torch.equal(found.features, truth.features)
    assert found.computed == len(other)
    same_shape = truth.features.shape == plain.features.shape
    assert not same_shape or not torch.equal(truth.features, plain.features)
    assert run(small_model(), rows).computed == 0  # the plain one is still there
    assert extract_features(model, other, progress=False, **options).computed == 0


def test_new_pictures_cost_only_themselves() -> None:
    model, rows = small_model(), dataset_of(LABELS)
    run(model, rows.select(range(5)))
    with counting(model.backbone) as batches:
        found = run(model, rows)
        mixed = run(model, rows.select([9, 2, 2, 0]))
    assert sum(batches) == len(LABELS) - 5
    assert (found.computed, mixed.computed) == (len(LABELS) - 5, 0)
    truth = run(model, rows, use_cache=False).features
    torch.testing.assert_close(found.features, truth, rtol=1e-5, atol=1e-5)
    assert torch.equal(mixed.features, found.features[[9, 2, 2, 0]])
    assert mixed.labels.tolist() == [LABELS[row] for row in (9, 2, 2, 0)]


def test_the_same_picture_twice_is_encoded_once() -> None:
    model, rows = small_model(), dataset_of(LABELS)
    twice = concatenate_datasets([rows, rows.select([3, 4])])
    with counting(model.backbone) as batches:
        found = run(model, twice)
    assert sum(batches) == len(LABELS)
    assert found.computed == len(LABELS)
    assert torch.equal(found.features[-2:], found.features[3:5])
    assert found.labels.tolist() == [*LABELS, *LABELS[3:5]]


def test_a_second_run_reads_no_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_folder(tmp_path / "all", {"ant": 3, "bee": 3})
    model, memory = small_model(), prepare(dataset_of(LABELS))
    files = load_splits(tmp_path / "all")["train"]
    first = [run(model, rows).features for rows in (memory, files)]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a picture was read")

    monkeypatch.setattr("hf_knn.data.batches.decoding", refuse)
    assert torch.equal(run(model, files).features, first[1])
    monkeypatch.setattr("hf_knn.data.keys._keys_of", refuse)
    assert torch.equal(run(model, memory).features, first[0])


def test_a_prepared_dataset_is_found_in_the_cache() -> None:
    model, rows = small_model(), dataset_of(LABELS)
    run(model, rows)
    assert run(model, prepare(rows)).computed == 0


def test_a_replaced_file_is_computed_again(tmp_path: Path) -> None:
    write_folder(tmp_path / "all", {"ant": 3, "bee": 3})
    model = small_model(NAMES[:2])
    before = run(model, load_splits(tmp_path / "all")["train"])
    assert run(model, load_splits(tmp_path / "all")["train"]).computed == 0
    bee = (tmp_path / "all" / "bee" / "0.png").read_bytes()
    (tmp_path / "all" / "ant" / "1.png").write_bytes(bee)
    after = run(model, load_splits(tmp_path / "all")["train"])
    torch.testing.assert_close(after.features[1], before.features[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["written over", "moved into place", "linked"])
def test_another_file_of_the_same_size_and_time_is_computed_again(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "all" / "ant"
    folder.mkdir(parents=True)
    old, new = (encoded(picture(0, seed), "BMP") for seed in (1, 2))
    place, beside = folder / "0.bmp", tmp_path / "beside.bmp"
    for path, data in ((place, old), (folder / "1.bmp", encoded(picture(0, 3), "BMP"))):
        path.write_bytes(data)
    beside.write_bytes(new)
    os.utime(beside, ns=(0, 10**18))
    os.utime(place, ns=(0, 10**18))
    model = small_model(NAMES[:1])
    before = run(model, load_splits(tmp_path / "all")["train"])
    assert run(model, load_splits(tmp_path / "all")["train"]).computed == 0
    known = fingerprint_of(load_splits(tmp_path / "all")["train"])
    time.sleep(0.05)  # the clock of a file system ticks slowly
    if how == "written over":
        place.write_bytes(new)
        os.utime(place, ns=(0, 10**18))
    elif how == "moved into place":
        beside.replace(place)
    else:
        place.unlink()
        place.hardlink_to(beside)
    assert (place.stat().st_size, place.stat().st_mtime_ns) == (len(old), 10**18)
    after = run(model, load_splits(tmp_path / "all")["train"])
    assert after.computed == 1
    assert after.contents is not None
    assert after.contents[0].numpy().tobytes() == content_of(picture(0, 2))
    assert not torch.allclose(after.features[0], before.features[0], atol=1e-4)
    assert fingerprint_of(load_splits(tmp_path / "all")["train"]) != known


def test_a_replaced_file_of_a_csv_is_computed_again(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 3, "bee": 3})
    table = tmp_path / "a.csv"
    table.write_text("path,label\nant/0.png,a\nant/1.png,a\nbee/0.png,b\n")
    model = small_model(["a", "b"])
    before = run(model, load_splits(table)["train"])
    (tmp_path / "ant" / "1.png").write_bytes((tmp_path / "bee" / "0.png").read_bytes())
    after = run(model, load_splits(table)["train"])
    torch.testing.assert_close(after.features[1], before.features[2], rtol=1e-5, atol=1e-5)


def test_where_the_cache_lies(
    knn_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = small_model(), dataset_of(LABELS)
    run(model, rows, use_cache=False)
    assert not knn_cache.exists()
    run(model, rows, cache_dir=tmp_path / "mine")
    assert not knn_cache.exists()
    assert len(list((tmp_path / "mine").rglob("*.safetensors"))) == 1
    assert run(model, rows, use_cache=False, cache_dir=tmp_path / "mine").computed == len(LABELS)
    assert run(model, rows, cache_dir=str(tmp_path / "mine")).computed == 0
    run(model, rows)
    assert list((knn_cache / "features").rglob("*.safetensors"))
    assert cache_root() == knn_cache
    monkeypatch.delenv("HF_KNN_CACHE")
    assert cache_root() == Path.home() / ".cache" / "hf_knn"


class Interrupted(BaseException):
    """Stands for Ctrl-C: nothing catches it on the way."""


@contextmanager
def interrupted(module: nn.Module, after: int) -> Iterator[None]:
    """Lets some forward passes of a backbone through and stops the next one."""
    left = [after]

    def stop(*_: Any) -> None:
        if not left[0]:
            raise Interrupted
        left[0] -= 1

    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def test_an_interrupted_run_goes_on_where_it_was(
    knn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 4)
    model, rows = small_model(), dataset_of(LABELS + LABELS[:3])  # shards of 4, 4, 4, 2
    truth = run(model, rows, use_cache=False)
    with interrupted(model.backbone, 5), pytest.raises(Interrupted):
        run(model, rows, batch_size=2)  # two whole shards and half of the third
    assert len(list(knn_cache.rglob("shard-*.safetensors"))) == 2
    with counting(model.backbone) as batches:
        found = run(model, rows, batch_size=2)
    assert batches == [2, 2, 2]
    assert found.computed == 6
    torch.testing.assert_close(found.features, truth.features, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.labels, truth.labels)
    assert torch.equal(found.ids, truth.ids)
    assert run(model, rows).computed == 0
    assert not list(knn_cache.rglob("*.tmp"))


@pytest.mark.parametrize("threads", [1, 2])
def test_what_was_computed_before_a_bad_picture_is_kept(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    model = small_model()
    with pytest.raises(ValueError, match="row 9"):
        run(model, dataset_of(LABELS, broken=[9]), batch_size=2)
    repaired = run(model, dataset_of(LABELS), batch_size=2)
    assert repaired.computed <= 5  # of 11: less than half a shard was ever in danger


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:20], lambda data: b"x"])
def test_damaged_names_of_pictures_are_made_again(
    damage: Callable[[bytes], bytes], knn_cache: Path
) -> None:
    model, rows = small_model(), dataset_of(LABELS)
    run(model, rows)
    (names,) = knn_cache.rglob("*.npy")
    whole = names.read_bytes()
    names.write_bytes(damage(whole))
    assert run(model, rows).computed == 0
    assert names.read_bytes() == whole


def test_a_replaced_file_among_pictures_in_memory_is_computed_again(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 1, "bee": 1})
    files = [tmp_path / name / "0.png" for name in ("ant", "bee")]
    cells = [{"bytes": files[1].read_bytes(), "path": None}, {"bytes": None, "path": str(files[0])}]
    kinds = Features({"image": ImageColumn(), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"image": cells, "label": [1, 0]}, features=kinds)
    model = small_model(["a", "b"])
    run(model, rows)
    files[0].write_bytes(files[1].read_bytes())
    found = run(model, rows)
    assert found.computed == 1
    torch.testing.assert_close(found.features[1], found.features[0], rtol=1e-5, atol=1e-5)


def test_threads_of_one_process_share_a_cache(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 2)
    model, rows = small_model(), prepare(dataset_of(LABELS * 4))
    parts = [rows.select(range(first, len(rows), 4)) for first in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: run(model, part, batch_size=1), parts))
    again = [run(model, part) for part in parts]
    assert sum(part.computed for part in found) == len(rows)
    assert [part.computed for part in again] == [0] * 4
    assert all(torch.equal(a.features, b.features) for a, b in zip(again, found, strict=True))
    assert "not cached" not in caplog.text


def test_a_missing_shard_alone_is_computed(
    knn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 4)
    model, rows = small_model(), dataset_of(LABELS)
    first = run(model, rows)
    shards = sorted(knn_cache.rglob("*.safetensors"))
    assert len(shards) == 3
    shards[1].unlink()
    # what a kill in the middle of a write leaves behind
    (shards[1].parent / ".shard-000000004.1.tmp").write_bytes(b"half")
    found = run(model, rows)
    assert found.computed == 4
    torch.testing.assert_close(found.features, first.features, rtol=1e-5, atol=1e-5)


def test_shards_of_another_size_are_not_taken_for_whole_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 4)
    model, rows = small_model(), dataset_of(LABELS)
    run(model, rows)
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 8)
    assert run(model, rows).ids.tolist() == list(range(len(LABELS)))


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flip, lambda data: data[:-8], lambda data: b"", lambda data: data + b"x"]
)
def test_a_damaged_shard_is_found_and_computed_again(
    damage: Callable[[bytes], bytes],
    knn_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 4)
    model, rows = small_model(), dataset_of(LABELS)
    first = run(model, rows)
    victim = sorted(knn_cache.rglob("*.safetensors"))[1]
    victim.write_bytes(damage(victim.read_bytes()))
    with caplog.at_level(logging.WARNING):
        found = run(model, rows)
    assert found.computed == 4
    assert victim.name in caplog.text
    assert "damaged" in caplog.text
    torch.testing.assert_close(found.features, first.features, rtol=1e-5, atol=1e-5)
    assert run(model, rows).computed == 0


@pytest.mark.parametrize(
    "kind",
    [
        "disk full",
        pytest.param(
            "no folder",
        ),
    ],
)
def test_a_cache_that_cannot_be_written_is_a_warning(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model, rows = small_model(), dataset_of(LABELS)
    truth = run(model, rows, use_cache=False)
    cache = tmp_path / "cache"
    if kind == "disk full":
        monkeypatch.setattr(cache_module, "save_file", full)
    else:
        (tmp_path / "file").write_text("in the way")
        cache = tmp_path / "file" / "cache"
    with caplog.at_level(logging.WARNING):
        found = run(model, rows, cache_dir=cache)
    assert torch.equal(found.features, truth.features)
    assert "not cached" in caplog.text
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".npy"]


# pictures that cannot be decoded


@pytest.mark.parametrize("shard_rows", [4, 256])
def test_fail_names_the_row_and_the_path(shard_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_ROWS", shard_rows)
    with pytest.raises(ValueError, match=rf"row 7 \(bee/7\.png\).*{RAW}") as caught:
        run(small_model(), dataset_of(LABELS, broken=[7, 9]))
    assert "on_bad_image='skip'" in str(caught.value)


def test_skip_leaves_out_and_reports(caplog: pytest.LogCaptureFixture) -> None:
    model, whole = small_model(), run(small_model(), dataset_of(LABELS), use_cache=False)
    rows = prepare(dataset_of(LABELS, broken=[0, 7, 9])).select(range(10, -1, -1))
    for computed in (True, False):  # also from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = run(model, rows, on_bad_image="skip", batch_size=2)
        assert (found.computed > 0) is computed
        assert found.ids.tolist() == [10, 8, 6, 5, 4, 3, 2, 1]
        assert found.labels.tolist() == [LABELS[row] for row in found.ids.tolist()]
        assert found.paths == [whole.paths[row] for row in found.ids.tolist()]
        wanted = whole.features[found.ids]
        torch.testing.assert_close(found.features, wanted, rtol=1e-5, atol=1e-5)
        assert found.contents is not None
        assert whole.contents is not None
        assert torch.equal(found.contents, whole.contents[found.ids])
        reported = [(bad.row, bad.sample_id, bad.path) for bad in found.skipped]
        assert reported == [(1, 9, "cat/9.png"), (3, 7, "bee/7.png"), (10, 0, "cat/0.png")]
        assert all(bad.reason == RAW for bad in found.skipped)
        assert caplog.text.count("Skipped row") == 3
    with pytest.raises(ValueError, match=r"row 1 \(cat/9\.png\)"):
        run(model, rows)  # the cache of a run that skipped is none for a run that must fail


def test_skip_a_whole_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 2)
    found = run(small_model(), dataset_of(LABELS, broken=[2, 3]), on_bad_image="skip")
    assert found.ids.tolist() == [0, 1, *range(4, len(LABELS))]
    assert found.labels.tolist() == [LABELS[row] for row in found.ids.tolist()]


def test_skipped_pictures_are_not_counted_as_computed() -> None:
    found = run(small_model(), dataset_of(LABELS, broken=[2, 3]), on_bad_image="skip")
    assert found.computed == len(LABELS) - 2


@pytest.mark.parametrize("on_bad_image", ["fail", "skip"])
def test_nothing_but_bad_pictures(on_bad_image: str) -> None:
    rows = dataset_of([0, 1, 2], broken=[0, 1, 2])
    with pytest.raises(ValueError, match=r"row 0.*not a picture") as caught:
        run(small_model(), rows, on_bad_image=on_bad_image)
    assert "can be decoded" in str(caught.value)


# refused


def test_an_empty_dataset() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        run(small_model(), dataset_of([0]).select([]))


def test_rows_without_labels() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\] have none"):
        run(small_model(), dataset_of([0, -1, 1]))


def test_a_missing_processor() -> None:
    with pytest.raises(ValueError, match="processing_class"):
        run(small_backbone(), dataset_of([0]))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be >= 1, but got 0"),
        ({"precision": "int8"}, "`precision` to be fp32, bf16 or fp16, but got 'int8'"),
        ({"on_bad_image": "ignore"}, "`on_bad_image` to be fail or skip, but got 'ignore'"),
    ],
)
def test_bad_options(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(small_model(), dataset_of([0]), **option)


def test_a_pooling_the_backbone_does_not_have() -> None:
    with pytest.raises(ValueError, match="pooler"):
        run(small_backbone(), dataset_of([0]), small_processor(), pooling="pooler")


# ImageFeatures


def test_selecting_rows_and_reading_one() -> None:
    whole = run(small_model(), dataset_of(LABELS, broken=[4]), on_bad_image="skip")
    whole.knn_log_probs = torch.arange(10.0)
    item = whole[3]
    assert item.keys() == {"features", "labels", "knn_log_probs"}
    assert torch.equal(item["features"], whole.features[3])
    assert (int(item["labels"]), float(item["knn_log_probs"])) == (1, 3.0)
    part = whole.select([5, 0, 0])
    assert torch.equal(part.features, whole.features[[5, 0, 0]])
    assert part.ids.tolist() == [6, 0, 0]
    assert part.labels.tolist() == [LABELS[6], LABELS[0], LABELS[0]]
    assert part.paths == [whole.paths[5], whole.paths[0], whole.paths[0]]
    assert part.label_names == whole.label_names
    assert (part.skipped, part.computed, part.seconds) == ([], 0, 0.0)
    assert part.knn_log_probs is None  # of other neighbours
    assert part[0].keys() == {"features", "labels"}
    assert len(whole) == 10  # left as it was
    assert len(whole.select(torch.tensor([], dtype=torch.int64))) == 0


@pytest.mark.parametrize("variable", ["HF_KNN_MAX_PIXELS", "HF_KNN_MAX_BYTES"])
def test_a_limit_that_is_raised_is_not_refused_by_the_cache(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = dataset_of(LABELS, sizes=[(8, 8)] * 3 + [(50, 50)], broken=[2])
    monkeypatch.setenv(variable, "1000")
    for _ in range(2):  # what does not decode stays known, what is too large is looked at again
        found = extract_features(small_model(), rows, on_bad_image="skip", progress=False)
        assert {bad.row for bad in found.skipped} == {2, 3, 7}
        assert "more than 1000" in found.skipped[1].reason
    with pytest.raises(ValueError, match=r"row 2 .*or raise the limit"):
        extract_features(
            small_model(), rows.select([0, 1, 3]).add_column("n", [0, 1, 2]), progress=False
        )
    monkeypatch.delenv(variable)
    found = extract_features(small_model(), rows, on_bad_image="skip", progress=False)
    assert [bad.row for bad in found.skipped] == [2]
    assert found.computed == 2

"""How the checkpoints beside this file were made, by version 0.1.0 of the package; not run again.

`python tests/golden/make_checkpoints_v1.py` in a clone of commit 5105f1e, with `tests` on the path,
writes `checkpoints-v1/` anew. Their code files are the same in each and lie once, in `code-v1/`.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.pictures import NAMES, dataset_of, picture, small_processor
from support.tiny import pixels, tiny_model
from torch import Tensor
from training.test_resume import make_trainer, noisy_rows

from hf_knn import Datastore, KnnForImageClassification, KnnTrainer, KnnTrainingArguments
from hf_knn.checkpoint import made_by

HERE = Path(__file__).parent


def vit_cosine() -> tuple[KnnForImageClassification, Tensor]:
    """A ViT, exact search by cosine."""
    return tiny_model("vit"), pixels(5, seed=9)


def l2_ivf() -> tuple[KnnForImageClassification, Tensor]:
    """Distances, an inverted file."""
    model = tiny_model("vit", rows=0, metric="l2", normalization="none", knn_temperature=2.0)
    with torch.no_grad():
        features = model(pixel_values=pixels(300, seed=100)).pooler_output
    labels = torch.arange(300) % 4
    model.datastore = Datastore.from_features(
        features, labels, ids=torch.arange(300) * 3 + 1, metric="l2", normalization="none",
        index="IVF8,Flat",
    )  # fmt: skip
    model.datastore.digest = made_by(model)
    return model, pixels(5, seed=9)


def two_poolings() -> tuple[KnnForImageClassification, Tensor]:
    """A ResNet whose datastore sees another pooling than its head."""
    return tiny_model("resnet", knn_pooling="max", k=5), pixels(5, seed=9)


def ridge_taught() -> tuple[KnnForImageClassification, Tensor]:
    """A ridge head, rows that were taught, receipts, small pictures."""
    base = make_trainer(Path(tempfile.mkdtemp())).model
    model = KnnForImageClassification.from_backbone(
        base.backbone, NAMES[:3], image_processor=small_processor(), head="ridge"
    )
    arguments = KnnTrainingArguments(
        tempfile.mkdtemp(), freeze_backbone=True, use_cpu=True, disable_tqdm=True, report_to="none"
    )
    rows = dataset_of([row % 3 for row in range(36)], names=NAMES[:3])
    trainer = KnnTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    model = trainer.model
    model.keep_thumbnails({row: rows[row]["image"] for row in range(6)})
    model.teach([picture(3, seed) for seed in range(4)], ["dog"] * 4)
    model.forget([2])
    batch = model.image_processor([picture(label, 50) for label in range(5)], return_tensors="pt")
    return model, batch["pixel_values"]


def answer(model: KnnForImageClassification, images: Tensor) -> dict[str, Tensor]:
    """What is compared."""
    with torch.no_grad():
        out = model.eval()(pixel_values=images, return_neighbors=True)
    found = {"pixel_values": images, "logits": out.logits, "head_logits": out.head_logits}
    if out.neighbors is not None:  # a training checkpoint has no rows
        found |= out.neighbors._asdict()
    return found


def main() -> None:
    """Writes all of them."""
    torch.set_num_threads(1)
    target = HERE / "checkpoints-v1"
    shutil.rmtree(target, ignore_errors=True)
    for make in (vit_cosine, l2_ivf, two_poolings, ridge_taught):
        folder = target / make.__name__
        model, images = make()
        model.save_pretrained(folder)
        found = KnnForImageClassification.from_pretrained(folder)
        save_file(answer(found, images), folder / "expected.safetensors")
    trainer = make_trainer(Path(tempfile.mkdtemp()), freeze_backbone=False, max_steps=4)
    trainer.train()
    newest = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"))[-1]
    folder = target / "trainer_checkpoint"
    shutil.copytree(newest, folder)
    found = KnnForImageClassification.from_pretrained(folder)
    images = found.image_processor(noisy_rows(5)["image"][:], return_tensors="pt")["pixel_values"]
    save_file(answer(found, images), folder / "expected.safetensors")

    code = HERE / "code-v1"
    shutil.rmtree(code, ignore_errors=True)
    code.mkdir()
    for folder in sorted(target.iterdir()):
        for path in sorted(folder.glob("*.py")):
            kept = code / path.name
            assert not kept.exists() or kept.read_bytes() == path.read_bytes()
            shutil.move(path, kept)
    print(json.dumps(sorted(path.name for path in code.iterdir())), file=sys.stderr)


if __name__ == "__main__":
    main()

"""What each rank does in training/test_distributed.py; also run with one rank, as the oracle."""

import json
import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from training.test_resume import CLASSES, fresh_model, noisy_rows
from transformers import set_seed

from hf_knn import KnnTrainer, KnnTrainingArguments, extract_features
from hf_knn.training.checkpoints import list_checkpoints, problem_of
from support.forks import Errand, outcome

ROWS, HELD_OUT = 43, 17  # neither is divisible by two ranks times the batch


def quiet(folder: Path, **options: Any) -> KnnTrainingArguments:
    values: dict[str, Any] = {
        "use_cpu": True, "disable_tqdm": True, "report_to": "none", "learning_rate": 0.01,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 5, "num_train_epochs": 2,
        "seed": 3, "feature_cache": False,
    }  # fmt: skip
    return KnnTrainingArguments(str(folder), **values | options)


def probe(folder: Path, report: dict[str, Any]) -> None:
    """Features, leave-one-out votes, tuning and metrics of a frozen backbone."""
    model = fresh_model("resnet")
    rows, held_out = noisy_rows(ROWS), noisy_rows(HELD_OUT, 1)
    features = extract_features(model, rows, use_cache=False, progress=False, batch_size=5)
    report["ids"] = features.ids.tolist()
    report["labels"] = features.labels.tolist()
    assert features.contents is not None
    report["contents"] = features.contents.tolist()
    args = quiet(
        folder / "probe", freeze_backbone=True, save_strategy="no",
        # the head must see the same batches: all rows at once on any number of ranks
        knn_loss_alpha=0.5, max_steps=1, num_train_epochs=1,
    )  # fmt: skip
    trainer = KnnTrainer(model, args, train_dataset=rows, eval_dataset=held_out)
    trainer._prepare_probe()
    prepared: Any = trainer.train_dataset
    own = prepared.knn_log_probs
    store = model.datastore
    assert store is not None
    neighbors = store.search(features.features, 5, features.ids)
    report["neighbor_ids"] = neighbors.ids.tolist()
    trainer.train_dataset = trainer.train_features
    result = trainer.tune()
    report["tuned"] = [result.k, result.temperature, result.knn_weight]
    metrics = trainer.evaluate()
    report["metrics"] = {k: v for k, v in metrics.items() if "top" in k or "nll" in k}
    trainer.save_model(str(folder / "checkpoint"))
    with pytest.MonkeyPatch.context() as patch:  # a rank by itself would choose otherwise
        choice = "compile" if os.environ.get("RANK") == "1" else "torch"
        patch.setattr("hf_knn.features.extract.choose_backend", lambda *_: choice)
        again = extract_features(model, rows, use_cache=False, progress=False, batch_size=5)
    report["backend"] = again.backend
    PartialState().wait_for_everyone()
    rank = os.environ.get("RANK", "0")
    save_file({"features": features.features, "own": own}, folder / f"tensors-{rank}.safetensors")


def fine_tune(folder: Path, report: dict[str, Any]) -> None:
    """A run with refreshes and checkpoints; all ranks must end with the same weights."""
    args = quiet(
        folder / "run", knn_loss_alpha=0.5, save_strategy="steps", save_steps=3, max_steps=6,
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    model = fresh_model("vit")
    data = {"train_dataset": noisy_rows(ROWS), "eval_dataset": noisy_rows(HELD_OUT, 1)}
    trainer = KnnTrainer(model, args, **data)
    trainer.train()
    report["weight"] = float(model.head.classifier.weight.double().sum())
    report["refreshes"] = sum("knn_mean_p" in entry for entry in trainer.state.log_history)
    report["store_ids"] = [] if model.datastore is None else model.datastore.ids.tolist()
    PartialState().wait_for_everyone()
    found = list_checkpoints(folder / "run")
    report["checkpoints"] = [[path.name, problem_of(path)] for path in found]
    report["random_states"] = sorted(path.name for path in found[0].glob("rng_state*"))
    again = KnnTrainer(fresh_model("vit"), args, **data)
    PartialState().wait_for_everyone()
    again.train(resume_from_checkpoint=str(found[0]))
    weight = again.model.head.classifier.weight
    report["same_after_resume"] = torch.equal(weight, model.head.classifier.weight)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    set_seed(3)
    report: dict[str, Any] = {"world": int(os.environ.get("WORLD_SIZE", "1"))}
    probe(folder, report)
    fine_tune(folder, report)
    rank = os.environ.get("RANK", "0")
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    assert set(report["ids"]) == set(range(ROWS))
    assert len(CLASSES) == 3


def fork_all(one: Path, two: Path) -> None:
    """One rank alone, then two together, as forks of this process: it has imported everything."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert outcome(partial(main, one)) == ""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}

    def work_as(rank: str) -> None:
        os.environ |= place | {"RANK": rank, "LOCAL_RANK": rank}
        main(two)

    started = [Errand.start(partial(work_as, rank)) for rank in "01"]
    assert [child.outcome() for child in started] == ["", ""]


if __name__ == "__main__":
    folders = list(map(Path, sys.argv[1:]))
    if len(folders) == 2:
        fork_all(*folders)
    else:
        main(*folders)

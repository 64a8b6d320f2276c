"""Pushes of a training run: each is whole, one commit with model, datastore, code and card."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..model.card import draw_reliability, make_card
from ..model.checkpoint import is_checkpoint_file
from ..model.code import legacy_code
from ..model.modeling import KnnForImageClassification
from ..store.hub import CARD_NAME, PushTarget
from .arguments import ARGUMENTS_NAME, KnnTrainingArguments

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"
"""Folder of a repository with the newest training checkpoint, for `hub_strategy="checkpoint"`."""

_RESUME_STATE = ("*.pt", "*.pth", "checkpoint-*", "**/checkpoint-*", "*/optimizer*")
"""What resuming needs of a training checkpoint; torch's own files, which no model loads."""


def prepare_push(
    model: KnnForImageClassification,
    source: Path,
    args: KnnTrainingArguments,
    target: PushTarget,
    message: str,
    inner: str | None = None,
) -> Callable[[], Any]:
    """Sets aside what a folder holds now; it may change or go before the push is over.

    Args:
        model: that is pushed, which the card tells about.
        source: a saved model, or a training checkpoint.
        args: of the run; hard links to what is pushed lie in its folder meanwhile.
        target: where to; what is None is as the arguments say.
        message: of the commit.
        inner: where the whole training checkpoint goes too, below the model; None leaves it.

    Returns:
        The push, to be called once. It returns `CommitInfo` and raises `PushConflictError` if the
        branch moved on meanwhile; nothing was overwritten then.
    """
    target = replace(
        target,
        private=args.hub_private_repo if target.private is None else target.private,
        token=target.token or args.hub_token,
        revision=target.revision or args.hub_revision,
    )
    staging = Path(tempfile.mkdtemp(prefix=".push-", dir=str(args.output_dir)))
    for path in source.iterdir():
        if is_checkpoint_file(path.name) or path.name == ARGUMENTS_NAME:
            _link(path, staging / path.name)
    if inner is not None:
        for path in source.rglob("*"):
            if path.is_file():
                _link(path, staging / inner / path.relative_to(source))
    extra = () if inner is None else _RESUME_STATE
    outdated = set() if inner is None else {f"{LAST_CHECKPOINT}/*"}

    def push() -> Any:
        try:
            opened = target.open()
            draw_reliability(model, staging)
            card = make_card(model, opened.repo_id, opened.read_text(CARD_NAME), staging)
            (staging / CARD_NAME).write_text(card, encoding="utf-8")
            replaced = sorted(legacy_code(opened.read_text) | outdated)
            return opened.push(staging, message, extra=extra, replaced=replaced)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    return push


def prepare_checkpoint_push(
    model: KnnForImageClassification,
    checkpoint: Path,
    args: KnnTrainingArguments,
    repo_id: str,
    step: int,
) -> Callable[[], Any]:
    """Sets aside a training checkpoint: its model, and all of it too where the strategy says so.

    Args:
        model: that the checkpoint holds.
        checkpoint: whole, and in its place.
        args: of the run.
        repo_id: where to.
        step: of the checkpoint.

    Returns:
        The push, see `prepare_push`.
    """
    folders = {
        HubStrategy.CHECKPOINT: LAST_CHECKPOINT,
        HubStrategy.ALL_CHECKPOINTS: checkpoint.name,
    }
    inner = folders.get(HubStrategy(args.hub_strategy))
    message = f"Training in progress, step {step}"
    return prepare_push(model, checkpoint, args, PushTarget(repo_id), message, inner)


def is_due(args: KnnTrainingArguments, last: PushInProgress | None) -> bool:
    """Whether a training checkpoint that was just saved is to be pushed.

    Args:
        args: of the run.
        last: what was pushed before, maybe still under way.
    """
    if HubStrategy(args.hub_strategy) == HubStrategy.END:
        return False
    return bool(args.hub_always_push) or last is None or last.is_done()


def push_in_background(
    api: HfApi, push: Callable[[], Any], last: PushInProgress | None
) -> PushInProgress:
    """Starts a push that nobody waits for; a failure is said.

    Args:
        api: whose only thread pushes, so that pushes follow each other.
        push: see `prepare_push`.
        last: what was pushed before, maybe still under way.

    Returns:
        What is under way now.
    """
    job = api.run_as_future(_say_failure, push)
    under_way: Any = [] if last is None or last.is_done() else last.jobs
    return PushInProgress([*under_way, job])  # type: ignore[arg-type]


def _say_failure(push: Callable[[], Any]) -> Any:
    try:
        return push()
    except Exception as error:
        logger.warning("A push during training failed: %s", error)
        raise


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copy2(path, target)

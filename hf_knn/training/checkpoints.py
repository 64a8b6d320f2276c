"""Training checkpoints: whole or invisible, the newest whole one, and what of them is pushed."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..core.manifest import hash_blocks
from ..core.plain_json import read_json
from ..model.before import is_checkpoint_file
from ..model.card import draw_reliability, leave_thumbnails, make_card
from ..model.code import legacy_code
from ..model.modeling import KnnForImageClassification
from ..store.folders import exchange, fsync_path, fsync_tree, write_durably
from ..store.hub import CARD_NAME, PushTarget
from .arguments import ARGUMENTS_NAME, KnnTrainingArguments

logger = logging.getLogger(__name__)

SEAL_NAME = "checkpoint_files.json"
"""File of a checkpoint that lists its other files with their SHA-256."""

STAGING = ".checkpoints.staging"
"""Folder of a run in which a checkpoint is built."""

_DISCARDED = ".checkpoints.discarded"

_REPLACED = ".checkpoints.replaced"
"""Where a checkpoint waits for the one that takes its name, if they cannot be exchanged."""

_NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Writes down what a checkpoint consists of.

    Args:
        folder: with every file of the checkpoint.
    """
    files = {
        path.relative_to(folder).as_posix(): hash_blocks(path)[0]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL_NAME
    }
    text = json.dumps(files, indent=2) + "\n"
    write_durably(folder / SEAL_NAME, lambda path: _write(path, text))


def problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole.

    Args:
        folder: of the checkpoint.
    """
    path = folder / SEAL_NAME
    if not path.is_file():
        return f"it has no {SEAL_NAME}: it was not finished, or not written by KnnTrainer"
    try:
        files = read_json(path)
        names = {str(name): str(sha256) for name, sha256 in files.items()}
    except (ValueError, AttributeError) as error:
        return f"{SEAL_NAME} is damaged: {error}"
    for name, sha256 in names.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if hash_blocks(file)[0] != sha256:
            return f"{name} is damaged or from another save"
    return None


def newest_whole(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole.

    Args:
        run_folder: the output folder of a training run.

    Returns:
        The checkpoint, or None, and what was skipped, newest first, with the reason.
    """
    skipped = []
    _put_back(run_folder)
    if (run_folder / STAGING).is_dir():
        unfinished = [path.name for path in (run_folder / STAGING).iterdir()]
        skipped += [f"{name}: its writer was interrupted" for name in sorted(unfinished)]
    for path in reversed(list_checkpoints(run_folder)):
        problem = problem_of(path)
        if problem is None:
            return path, skipped
        skipped.append(f"{path.name}: {problem}")
    return None, skipped


def find_whole(run_folder: Path, wanted: str | bool | None) -> str | None:
    """The checkpoint to resume from, after a look at all its files.

    Args:
        run_folder: the output folder of a training run.
        wanted: a checkpoint's folder, or True for the newest one of the run that is whole, which is
            said, with what was skipped; None and False are no checkpoint.

    Raises:
        ValueError: if it is not whole, or none is.
    """
    if not wanted:
        return None
    if wanted is True:
        found, skipped = newest_whole(run_folder)
        for reason in skipped:
            logger.warning("Skipped a checkpoint that is not whole, %s.", reason)
        if found is None:
            raise ValueError(
                f"Expected a whole checkpoint in {run_folder} to resume from, but got "
                f"{len(skipped)} that are not whole; start without resuming."
            )
        logger.warning("Resuming from %s.", found)
        return str(found)
    problem = problem_of(Path(wanted))
    if problem is not None:
        raise ValueError(
            f"Expected {wanted} to be a whole checkpoint, but {problem}; pass "
            "resume_from_checkpoint=True for the newest one that is."
        )
    return str(wanted)


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first.

    Args:
        run_folder: the output folder of a training run; need not exist.
    """
    entries = run_folder.iterdir() if run_folder.is_dir() else iter(())
    numbered = [(int(found[1]), path) for path in entries if (found := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered) if path.is_dir()]


def start_staging(run_folder: Path) -> Path:
    """An empty hidden folder for the next checkpoint; clears what a kill left.

    Args:
        run_folder: the output folder of a training run.
    """
    _put_back(run_folder)
    for name in (STAGING, _DISCARDED):
        shutil.rmtree(run_folder / name, ignore_errors=True)
    staging = run_folder / STAGING
    staging.mkdir(parents=True)
    return staging


def publish(run_folder: Path, name: str) -> Path:
    """Seals a staged checkpoint and puts it in its place.

    Args:
        run_folder: the output folder of a training run.
        name: `checkpoint-<step>`, in the staging folder.

    Returns:
        Where it is now.
    """
    staged, final = run_folder / STAGING / name, run_folder / name
    seal(staged)
    fsync_tree(staged)
    if final.exists() and not exchange(staged, final):
        (run_folder / _REPLACED).mkdir()
        os.rename(final, run_folder / _REPLACED / name)
    if staged.exists() and not final.exists():
        os.rename(staged, final)
    fsync_path(run_folder)
    for old in (STAGING, _REPLACED):
        shutil.rmtree(run_folder / old, ignore_errors=True)
    return final


def _put_back(run_folder: Path) -> None:
    """Ends what a kill between the two renames of `publish` left: the old checkpoint is there."""
    replaced = run_folder / _REPLACED
    for path in list(replaced.iterdir()) if replaced.is_dir() else []:
        if not (run_folder / path.name).exists():
            os.rename(path, run_folder / path.name)
    shutil.rmtree(replaced, ignore_errors=True)


def publish_with_state(run_folder: Path, name: str, state: TrainerState, limit: int | None) -> Path:
    """Puts a staged checkpoint in its place, which its state knows, and deletes surplus ones.

    Args:
        run_folder: the output folder of a training run.
        name: `checkpoint-<step>`, in the staging folder.
        state: of the trainer.
        limit: how many checkpoints may stay; None for all.

    Returns:
        Where it is now.
    """
    state.save_to_json(str(run_folder / STAGING / name / TRAINER_STATE_NAME))
    final = publish(run_folder, name)
    rotate(run_folder, limit, state.best_model_checkpoint)
    return final


def discard(run_folder: Path, checkpoint: Path) -> None:
    """Deletes a checkpoint, which is invisible before its first file goes.

    Args:
        run_folder: the output folder of a training run.
        checkpoint: below it; need not exist.
    """
    if not checkpoint.exists():
        return
    grave = run_folder / _DISCARDED
    grave.mkdir(exist_ok=True)
    target = grave / checkpoint.name
    shutil.rmtree(target, ignore_errors=True)
    os.rename(checkpoint, target)
    shutil.rmtree(grave, ignore_errors=True)


def rotate(run_folder: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints, never the newest or the best.

    Args:
        run_folder: the output folder of a training run.
        limit: how many may stay; None for all.
        best: the best checkpoint, if it is known.
    """
    if limit is None or limit < 1:
        return
    checkpoints = list_checkpoints(run_folder)
    protected = {checkpoints[-1].name} if checkpoints else set()
    if best is not None:
        protected.add(Path(best).name)
    others = [path for path in checkpoints if path.name not in protected]
    surplus = len(checkpoints) - max(limit, len(protected))
    for path in others[: max(0, surplus)]:
        discard(run_folder, path)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


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
        leave_thumbnails(staging / inner)
    leave_thumbnails(staging)
    extra = () if inner is None else _RESUME_STATE
    outdated = set() if inner is None else {f"{LAST_CHECKPOINT}/*"}

    def push() -> Any:
        try:
            opened = target.open()
            draw_reliability(model, staging)
            before = opened.read_text(CARD_NAME)
            card = make_card(model, opened.repo_id, before, staging, thumbnails=False)
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

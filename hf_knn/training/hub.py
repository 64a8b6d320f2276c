"""A `Trainer` whose pushes are whole: one commit with model, datastore, code and card."""

import logging
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..model.card import draw_reliability, make_card
from ..model.checkpoint import is_checkpoint_file
from ..model.code import legacy_code
from ..store.hub import CARD_NAME, PushTarget
from .arguments import ARGUMENTS_NAME
from .checkpoints import SealedTrainer

logger = logging.getLogger(__name__)


LAST_CHECKPOINT = "last-checkpoint"


_RESUME_STATE = ("*.pt", "*.pth", "checkpoint-*", "**/checkpoint-*", "*/optimizer*")
"""What resuming needs of a training checkpoint; torch's own files, which no model loads."""


class HubTrainer(SealedTrainer):
    """Pushes during and after training, each push whole.

    Args:
        args: see `transformers.Trainer`.
        kwargs: see `transformers.Trainer`.
    """

    push_in_progress: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._background = HfApi()  # it has one thread, so that pushes follow each other
        super().__init__(*args, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Any:
        """Saves into `output_dir` and pushes it in one commit; the card is made anew.

        Args:
            commit_message: of the commit.
            blocking: wait for it; False returns a future.
            token: a token; None is that of the arguments.
            revision: a branch; None is that of the arguments.
            private: whether a repository that is made is private; None is as the arguments say.

        Returns:
            `CommitInfo`, or a future of it; None on other ranks than the first.

        Raises:
            PushConflictError: if the branch moved on meanwhile; nothing was overwritten.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        staging = self._stage(Path(str(self.args.output_dir)), None)
        push = partial(self._push_staged, staging, commit_message or "", token, revision, private)
        return push() if blocking else self._background.run_as_future(push)

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Pushes a checkpoint that is whole, in the background."""
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if under_way and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        inner = None
        if strategy != HubStrategy.EVERY_SAVE:
            inner = LAST_CHECKPOINT if strategy == HubStrategy.CHECKPOINT else checkpoint.name
        staging = self._stage(checkpoint, inner)
        message = f"Training in progress, step {self.state.global_step}"
        job = self._background.run_as_future(partial(self._push_staged, staging, message))
        if under_way:
            self.push_in_progress.jobs.append(job)
        else:
            self._tell_failed_pushes()
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]

    def _finish_current_push(self) -> None:
        """Waits for pushes in the background, and says which failed."""
        super()._finish_current_push()
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        """Says which pushes failed, of those that have ended and are about to be forgotten."""
        progress = getattr(self, "push_in_progress", None)
        for job in [] if progress is None else progress.jobs:
            error = job.exception()
            if error is not None:
                logger.warning("A push during training failed: %s", error)

    def _stage(self, source: Path, inner: str | None) -> Path:
        """A folder with what is pushed, as hard links: `source` may change or go meanwhile.

        Args:
            source: a saved model, or a training checkpoint.
            inner: where the whole training checkpoint goes too, below the model; None leaves it.
        """
        staging = Path(tempfile.mkdtemp(prefix=".push-", dir=str(self.args.output_dir)))
        for path in source.iterdir():
            if is_checkpoint_file(path.name) or path.name == ARGUMENTS_NAME:
                _link(path, staging / path.name)
        if inner is not None:
            for path in source.rglob("*"):
                if path.is_file():
                    _link(path, staging / inner / path.relative_to(source))
        return staging

    def _push_staged(
        self,
        staging: Path,
        message: str,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Any:
        target = PushTarget(
            str(self.hub_model_id),
            private=private if private is not None else self.args.hub_private_repo,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
        )
        try:
            opened = target.open()
            draw_reliability(self.model, staging)
            card = make_card(self.model, opened.repo_id, opened.read_text(CARD_NAME), staging)
            (staging / CARD_NAME).write_text(card, encoding="utf-8")
            has_state = any(path.is_dir() for path in staging.iterdir())
            replaced = legacy_code(opened.read_text)
            replaced |= {f"{LAST_CHECKPOINT}/*"} if has_state else set()
            return opened.push(
                staging,
                message,
                extra=_RESUME_STATE if has_state else (),
                replaced=sorted(replaced),
            )
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copy2(path, target)

"""The part of a trainer that saves, pushes and resumes: whole checkpoints with their datastore."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import Trainer

from ..core.manifest import MANIFEST_NAME
from ..model.modeling import KnnForImageClassification
from ..store.hub import PushTarget
from .arguments import KnnTrainingArguments
from .checkpoints import (
    STAGING,
    find_whole,
    is_due,
    prepare_checkpoint_push,
    prepare_push,
    publish_with_state,
    push_in_background,
    start_staging,
)
from .loss import KnnLoss


class SavingTrainer(Trainer):
    """A trainer whose checkpoints are whole or invisible and hold the datastore of their weights.

    Attributes:
        loss: what a resumed run needs to know is saved too.
    """

    model: KnnForImageClassification
    args: KnnTrainingArguments
    loss: KnnLoss
    push_in_progress: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._datastore_step = -1  # whose weights the datastore is of
        self._is_staging = False
        self._background = HfApi()  # it has one thread, so that pushes follow each other
        super().__init__(*args, **kwargs)

    def whole_checkpoint(self, wanted: str | bool | None) -> str | None:
        """The checkpoint in `output_dir` to resume from, see `find_whole`."""
        return find_whole(Path(str(self.args.output_dir)), wanted)

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
        self._finish_current_push()  # it reads in the folder that is replaced now
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        target = PushTarget(str(self.hub_model_id), private, token, revision)
        folder = Path(str(self.args.output_dir))
        push = prepare_push(self.model, folder, self.args, target, commit_message or "")
        return push() if blocking else self._background.run_as_future(push)

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints go; while one is built, a hidden folder below it."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / STAGING) if self._is_staging else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Saves a training checkpoint, which appears whole or not at all, and pushes it."""
        run_folder = Path(self._get_output_dir(trial))
        name, best = f"checkpoint-{self.state.global_step}", self.state.best_global_step
        known = run_folder / f"checkpoint-{best}" if best else None
        if self.args.should_save:
            start_staging(run_folder)
        self.accelerator.wait_for_everyone()
        self._is_staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_staging = False
        if known is not None and (known.name == name or known.exists()):
            self.state.best_model_checkpoint = str(known)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            final = publish_with_state(run_folder, name, self.state, self.args.save_total_limit)
            if self.model.datastore is not None and (final / MANIFEST_NAME).is_file():
                self.model.datastore.home = final  # the next one links what did not change
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a checkpoint in the background, once it is whole and in its place."""
        last = self.push_in_progress
        if self._is_staging or not self.is_world_process_zero() or not is_due(self.args, last):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder, repo_id = Path(checkpoint_folder), str(self.hub_model_id)
        step = self.state.global_step
        push = prepare_checkpoint_push(self.model, folder, self.args, repo_id, step)
        self.push_in_progress = push_in_background(self._background, push, last)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Saves a whole checkpoint; the arguments as JSON, since a pickle is nobody's friend."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        store = self.model.datastore
        if self.is_in_train and not self.args.freeze_backbone:
            # one of other weights does not belong into this checkpoint
            is_current = self._datastore_step == self.state.global_step
            self.model.datastore = store if is_current else None
        try:
            self.model.save_pretrained(folder, state_dict=state_dict)
        finally:
            self.model.datastore = store
        self.args.write_json(folder)
        if self.is_in_train:
            self.loss.save(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Restores weights and datastore; Trainer's own way loses renamed tensors silently."""
        folder = Path(resume_from_checkpoint)
        trusts = self.args.names_index
        loaded = KnnForImageClassification.from_pretrained(folder, trust_faiss_index=trusts)
        self.model.load_state_dict(loaded.state_dict())
        self.model.datastore = loaded.datastore
        if self.args.reweights and not self.args.freeze_backbone:
            self.loss.load(folder)

    def _load_best_model(self) -> None:
        """Restores weights and datastore of the best checkpoint."""
        best = self.state.best_model_checkpoint
        assert best is not None
        self._load_from_checkpoint(best)
        self._datastore_step = self.state.best_global_step or -1

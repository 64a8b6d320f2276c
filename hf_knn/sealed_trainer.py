"""A `Trainer` whose checkpoints appear whole or not at all, and that resumes from whole ones."""

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from .manifest import MANIFEST_NAME
from .modeling_knn import KnnForImageClassification
from .resume import STAGING, newest_whole, problem_of, publish, rotate, start_staging

logger = logging.getLogger(__name__)


class SealedTrainer(Trainer):
    """Builds each training checkpoint in a hidden folder and puts it in place in one step.

    Args:
        args: see `transformers.Trainer`.
        kwargs: see `transformers.Trainer`.
    """

    model: KnnForImageClassification

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._staging = False
        super().__init__(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints go; while one is built, a hidden folder below it."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / STAGING) if self._staging else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves a training checkpoint, which appears whole or not at all."""
        run_folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        best = self.state.best_global_step
        known = f"checkpoint-{best}" if best else None
        if self.args.should_save:
            start_staging(run_folder)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        if known is not None and (known == name or (run_folder / known).exists()):
            self.state.best_model_checkpoint = str(run_folder / known)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(run_folder / STAGING / name / TRAINER_STATE_NAME))
            final = publish(run_folder, name)
            if self.model.datastore is not None and (final / MANIFEST_NAME).is_file():
                self.model.datastore.home = final  # the next one links what did not change
            rotate(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_checkpoint(run_folder / name)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: `_save_checkpoint` pushes once the checkpoint is whole."""

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Pushes a checkpoint that is whole; for a subclass that can."""
        raise NotImplementedError

    def whole_checkpoint(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to resume from, after a look at all its files.

        Args:
            wanted: its folder, or True for the newest one in `output_dir` that is whole.

        Raises:
            ValueError: if it is not whole, or none is.
        """
        if not wanted:
            return None
        if wanted is True:
            found, skipped = newest_whole(Path(str(self.args.output_dir)))
            for reason in skipped:
                logger.warning("Skipped a checkpoint that is not whole, %s.", reason)
            if found is None:
                raise ValueError(
                    f"Expected a whole checkpoint in {self.args.output_dir} to resume from, but "
                    f"got {len(skipped)} that are not whole; start without resuming."
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

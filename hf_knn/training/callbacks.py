"""What happens at the beginning and the end of epochs and steps of a fine-tuning run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from ..data.augmentation import EpochRows
from .arguments import KnnTrainingArguments
from .loss import KnnLoss


class EpochCallback(TrainerCallback):
    """Tells the rows which epoch it is, before workers copy them.

    Args:
        rows: the training rows.
    """

    def __init__(self, rows: EpochRows) -> None:
        self.rows = rows

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by `Trainer`; a resumed run begins in the middle of an epoch."""
        self.rows.set_epoch(int(state.epoch or 0))


class RefreshCallback(TrainerCallback):
    """Rebuilds the datastore that the loss asks, on its schedule.

    Args:
        refresh: rebuilds it from the weights as they are.
        loss: asks the votes of the last refresh; a resumed run has those of its checkpoint.
    """

    def __init__(self, refresh: Callable[[], None], loss: KnnLoss) -> None:
        self.refresh, self.loss = refresh, loss

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by `Trainer`; a resumed run begins in the middle of an epoch."""
        is_boundary = float(state.epoch or 0).is_integer()
        if self.loss.votes is None or (args.knn_refresh == "epoch" and is_boundary):
            self.refresh()

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by `Trainer` before each update."""
        steps = args.refresh_steps
        if steps and state.global_step and state.global_step % steps == 0:
            self.refresh()


def callbacks_of(
    rows: Any, args: KnnTrainingArguments, refresh: Callable[[], None], loss: KnnLoss
) -> list[TrainerCallback]:
    """The callbacks that a run needs: none on cached features.

    Args:
        rows: that are trained on.
        args: of the run.
        refresh: see `RefreshCallback`.
        loss: of the run.
    """
    callbacks: list[TrainerCallback] = []
    if args.freeze_backbone:
        return callbacks
    if isinstance(rows, EpochRows):
        callbacks.append(EpochCallback(rows))
    if args.reweights:
        callbacks.append(RefreshCallback(refresh, loss))
    return callbacks


@contextmanager
def taking_part(trainer: Trainer, callbacks: Sequence[TrainerCallback]) -> Iterator[None]:
    """Adds callbacks to a trainer, and takes them away afterwards."""
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        yield
    finally:
        for callback in callbacks:
            trainer.remove_callback(callback)


class EpochReport(TrainerCallback):
    """Prints one line per measurement: how far the run is, its loss and the three voices.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.loss: float | None = None

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by `Trainer`: keeps the last training loss."""
        self.loss = (logs or {}).get("loss", self.loss)

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by `KnnTrainer.evaluate`."""
        if not state.is_world_process_zero or metrics is None or not state.epoch:
            return
        voices = {"head": "head", "knn": "k-NN", "blend": "blend"}
        shown = [
            f"{name} {metrics[f'eval_{voice}_top1']:.1%}"
            for voice, name in voices.items()
            if f"eval_{voice}_top1" in metrics
        ]
        loss = [] if self.loss is None else [f"loss {self.loss:.3f}"]
        self.say(
            f"Epoch {state.epoch:.0f} of {args.num_train_epochs:.0f}: {', '.join([*loss, *shown])}"
        )

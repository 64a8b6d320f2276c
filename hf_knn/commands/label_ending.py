"""What `hf-knn label` says when everything was written, on the page and in the terminal."""

from pathlib import Path

from ..labelling.outcome import Outcome
from ..labelling.shown import Ending, Next
from .console import command_line, console, escape


def ending_of(outcome: Outcome, folder: Path) -> Ending:
    """What was written, and what to type next.

    Args:
        outcome: of the session.
        folder: of the pictures.
    """
    count = outcome.labelled
    some = "1 picture has its label" if count == 1 else f"{count:,} pictures have their labels"
    said = [f"{some} in {outcome.csv}."]
    if outcome.folder is not None:
        said.append(f"A folder for each class is in {outcome.folder}.")
    if outcome.model is None:
        commands = [Next("Make a model of them:", command_line("train", outcome.csv))]
    else:
        said.append(f"The model that learned from them is {outcome.model}.")
        commands = [
            Next("See what it says of all pictures:",
                 command_line("predict", outcome.model, folder)),
            Next("Put it on the Hub:", command_line("push", outcome.model, "YOUR-NAME/MODEL")),
        ]  # fmt: skip
    return Ending([*said, *outcome.notes], commands)


def say_ending(ending: Ending) -> None:
    """Prints it.

    Args:
        ending: see `ending_of`.
    """
    for sentence in ending.said:
        console.print(escape(sentence), soft_wrap=True, highlight=False)
    for each in ending.commands:
        line = f"{escape(each.what)} [bold]{escape(each.command)}[/]"
        console.print(line, soft_wrap=True, highlight=False)

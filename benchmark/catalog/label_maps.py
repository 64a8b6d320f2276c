"""Where the classes of a test set lie among those of the task that has its training pictures."""

from collections.abc import Sequence
from enum import StrEnum
from importlib.resources import files


class LabelMap(StrEnum):
    """How the labels of test pictures name classes of another task.

    `names`: as that task does. `numbers`: by their position there. `wnids`: by the WordNet ids of
    ImageNet-1k, whose classes are in their order.
    """

    NAMES = "names"
    NUMBERS = "numbers"
    WNIDS = "wnids"


def imagenet_wnids() -> list[str]:
    """The 1,000 WordNet ids of ImageNet-1k in the order of its classes, as timm lists them."""
    listed = files("timm") / "data" / "_info" / "imagenet_synsets.txt"
    return listed.read_text(encoding="utf-8").split()


def positions_of(labels: Sequence[str], classes: Sequence[str], how: LabelMap) -> list[int]:
    """The class of each label.

    Args:
        labels: as the test pictures have them.
        classes: of the training pictures, in the order of their numbers.
        how: to read a label.

    Raises:
        ValueError: for labels that name no class, or ids for classes that are not ImageNet-1k's.
    """
    if how is LabelMap.WNIDS and len(classes) != len(imagenet_wnids()):
        raise ValueError(
            f"Expected the {len(imagenet_wnids()):,} classes of ImageNet-1k to look WordNet ids up "
            f"in, but got {len(classes)}; do correct train_from in catalog/tasks.py."
        )
    known = {
        LabelMap.NAMES: classes,
        LabelMap.NUMBERS: [str(number) for number in range(len(classes))],
        LabelMap.WNIDS: imagenet_wnids() if how is LabelMap.WNIDS else (),
    }[how]
    place = {label: number for number, label in enumerate(known)}
    foreign = sorted(set(labels) - place.keys())
    if foreign:
        raise ValueError(
            f"Expected labels that are {how} of {len(classes):,} classes, but {foreign[:5]} are "
            "not; do correct label_map or the column of labels in catalog/tasks.py."
        )
    return [place[label] for label in labels]

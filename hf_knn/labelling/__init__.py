"""Labels for pictures that have none: what is asked, what was answered, and what comes of it."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy_names

if TYPE_CHECKING:
    from .order import Rule as Rule
    from .order import next_pictures as next_pictures
    from .order import rule_for as rule_for
    from .order import similarities as similarities
    from .order import unsure_of as unsure_of
    from .questions import Copies as Copies
    from .questions import Group as Group
    from .questions import Kept as Kept
    from .questions import Named as Named
    from .questions import Picture as Picture
    from .questions import Skipped as Skipped
    from .session import Session as Session

_HOMES = {
    "Copies": "questions",
    "Group": "questions",
    "Kept": "questions",
    "Named": "questions",
    "Picture": "questions",
    "Rule": "order",
    "Session": "session",
    "Skipped": "questions",
    "next_pictures": "order",
    "rule_for": "order",
    "similarities": "order",
    "unsure_of": "order",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)

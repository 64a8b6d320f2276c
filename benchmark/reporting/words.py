"""Words and numbers as a report prints them."""

import unicodedata

MINUS, DASH = "\u2212", "\u2013"
_DROPPED = ("Cc", "Cf", "Cs", "Co")
ARM_NAMES = {
    "fixed": "fixed blend",
    "trials": "six-trial linear",
    "knn_sklearn": "k-NN (scikit-learn)",
    "ncm": "nearest class mean",
    "kernel_ridge": "kernel ridge",
    "svm": "RBF-SVM",
    "lda": "shrinkage LDA",
    "forest": "random forest",
    "dino": "DINO vote",
    "knn": "k-NN",
    "knn_grid": "k-NN, whole grid",
}


def arm_name(arm: str) -> str:
    """An arm in words."""
    if arm.startswith("blend:"):
        return " + ".join(arm_name(part) for part in arm.removeprefix("blend:").split("+"))
    return ARM_NAMES.get(arm, arm)


def clean(text: object) -> str:
    """A text in one line without control characters and turns of direction."""
    spaced = (" " if character in "\n\r\t\v\f" else character for character in str(text))
    return "".join(c for c in spaced if unicodedata.category(c) not in _DROPPED).strip()


def points(value: float, digits: int = 1) -> str:
    """A share as signed percentage points, with a true minus."""
    return signed(100 * value, digits)


def signed(value: float, digits: int) -> str:
    """A number with its sign, and a true minus."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def difference_name(first: str, second: str) -> str:
    """Two arms, the second taken from the first."""
    names = (f"({n})" if " + " in n else n for n in map(arm_name, (first, second)))
    return f" {MINUS} ".join(names)


def percent(mean: float, std: float | None = None) -> str:
    """A share in percent, with its standard deviation if there is one."""
    shown = f"{100 * mean:.1f}"
    return shown if std is None or std != std else f"{shown} ± {100 * std:.1f}"


def p_value(p: float) -> str:
    """A p-value as a table shows it; a dash for none."""
    if p != p:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def plural(count: int, word: str) -> str:
    """A word with its s unless there is exactly one."""
    return word if count == 1 else f"{word}s"


def p_words(p: float) -> str:
    """A p-value as a sentence says it, kept on one line."""
    shown = p_value(p)
    return f"p {shown if shown.startswith('<') else f'= {shown}'}".replace(" ", "\u00a0")

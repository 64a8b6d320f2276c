"""The protocols of a benchmark, as a report speaks of them."""

from reporting.cells import Results

PROTOCOLS = {
    "knn": (
        "Head, neighbours and blend",
        "The blend and k-NN are tuned on validation; the fixed blend is not tuned at all (k 20, "
        "T 0.14, λ 0.5).",
    ),
    "lowdata": (
        "Few labelled pictures",
        "Pictures per class for training; labels used for validation are part of them.",
    ),
    "heads": (
        "Which head?",
        "Each head alone and beside the neighbours, and auto: what `hf-knn train --head auto` "
        "chooses on validation, by one rule for all splits.",
    ),
    "lowdata_heads": (
        "Which head, with few pictures?",
        "As above, everything chosen on folds of the few pictures. Below 3 per class auto compares "
        "nothing: it takes ridge alone.",
    ),
    "lowdata_losses": (
        "Losses, few pictures",
        "Losses and their controls as below; each head is chosen on the same folds of the few.",
    ),
    "linear": (
        "Loss of the linear head",
        "Each loss had the same number of trials. Shuffled: the factors of the reweighted loss, "
        "dealt to other pictures; constant: their mean for all. What remains of a gain there has "
        "nothing to do with what k-NN finds hard.",
    ),
    "finetune": ("Fine-tuning", "The whole network is trained, then head and neighbours vote."),
    "robustness": ("Shifted test pictures", "Everything is chosen on pictures without the shift."),
    "peers": (
        "Is it k-NN, or any second voice?",
        "Other classical models on the same features, each alone, beside the head, and beside "
        "k-NN. Every voice, k-NN among them, was chosen among four settings (the DINO vote has "
        "one), its temperature among 17 and its weight beside the head among 21.",
    ),
    "complementarity": ("What the voices have in common", ""),
}
"""Protocols in the order of a report: heading, and what one should know."""

FOREST = {
    "knn": ("blend", "head"), "heads": ("auto", "blend:ridge+knn"),
    "linear": ("reweighted", "plain"), "finetune": ("blend", "head"),
    "robustness": ("blend", "head"),
}  # fmt: skip
"""The comparison of a protocol that is drawn."""


def protocols_of(results: Results) -> list[str]:
    """The protocols that a run has, known ones first."""
    there = dict.fromkeys(cell.setting.protocol for cell in results.cells)
    known = [name for name in PROTOCOLS if name in there]
    return known + [name for name in there if name not in PROTOCOLS]

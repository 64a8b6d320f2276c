"""Heads, the blend, and their numbers, from features."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy_names

if TYPE_CHECKING:
    from .blend import TuneResult as TuneResult
    from .blend import default_grid as default_grid
    from .blend import tune as tune
    from .choice import HeadChoice as HeadChoice
    from .choice import compare_heads as compare_heads
    from .closed import ClosedCell as ClosedCell
    from .closed import ClosedFit as ClosedFit
    from .closed import fit_closed as fit_closed
    from .grids import FactorControl as FactorControl
    from .grids import ProbeConfig as ProbeConfig
    from .grids import ProbeGrid as ProbeGrid
    from .grids import ProbeSettings as ProbeSettings
    from .heads import refit as refit
    from .held_out import LabelledRows as LabelledRows
    from .linear import fit_linear as fit_linear
    from .metric import MetricChoice as MetricChoice
    from .metric import choose_metric as choose_metric
    from .metrics import score_log_probs as score_log_probs
    from .plots import draw_neighbors as draw_neighbors
    from .report import Report as Report
    from .ridge import fit_ridge as fit_ridge
    from .sweep import ProbeScore as ProbeScore
    from .sweep import choose_probe as choose_probe
    from .sweep import score_probes as score_probes
    from .sweep import train_probes as train_probes
    from .voices import out_of_fold as out_of_fold
    from .weights import knn_loss_weights as knn_loss_weights

_HOMES = {
    "ClosedCell": "closed",
    "ClosedFit": "closed",
    "FactorControl": "grids",
    "MetricChoice": "metric",
    "HeadChoice": "choice",
    "LabelledRows": "held_out",
    "ProbeConfig": "grids",
    "ProbeGrid": "grids",
    "ProbeScore": "sweep",
    "ProbeSettings": "grids",
    "Report": "report",
    "TuneResult": "blend",
    "choose_metric": "metric",
    "choose_probe": "sweep",
    "compare_heads": "choice",
    "default_grid": "blend",
    "draw_neighbors": "plots",
    "fit_closed": "closed",
    "fit_linear": "linear",
    "fit_ridge": "ridge",
    "knn_loss_weights": "weights",
    "out_of_fold": "voices",
    "refit": "heads",
    "score_log_probs": "metrics",
    "score_probes": "sweep",
    "train_probes": "sweep",
    "tune": "blend",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)

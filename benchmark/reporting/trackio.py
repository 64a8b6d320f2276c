"""Logs results to trackio, which is local unless told otherwise."""

from collections import defaultdict

from reporting.cells import Cell, Results


def log_to_trackio(results: Results, project: str) -> int:
    """Logs a run per setting and arm, one step per split.

    Args:
        results: of a run.
        project: of trackio.

    Returns:
        How many runs there are.

    Raises:
        ModuleNotFoundError: if trackio is not installed.
    """
    import trackio

    runs: dict[str, list[tuple[Cell, str]]] = defaultdict(list)
    for setting, cells in results.settings().items():
        for cell in cells:
            for arm in cell.arms:
                name = ", ".join(filter(None, [*setting.pair, setting.protocol, setting.detail]))
                runs[f"{name}, {arm}"].append((cell, arm))
    for name, logged in runs.items():
        config = logged[0][0].setting._asdict()
        trackio.init(project=project, name=name, config=config)
        for cell, arm in logged:
            entry = cell.arms[arm]
            numbers = {
                f"{part}_{metric}": value
                for part in ("validation", "test", "test_clean")
                for metric, value in (entry.get(part) or {}).items()
            }
            trackio.log(numbers | {"seed": cell.seed})
        trackio.finish()
    return len(runs)

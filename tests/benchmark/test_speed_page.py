"""The page of speeds: numbers a reader can take in, the claims first, nothing left out."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmark" / "speed"))

from speed_page import write_page
from speed_tables import fact_tables, shown

MACHINE = {"processor": "of a test", "threads": 2}


def timing(name: str, *seconds: float, ratios: tuple[float, float, float]) -> dict[str, Any]:
    ratio, low, high = ratios
    return {
        "name": name, "seconds": list(seconds), "ratio": ratio, "ratio_low": low,
        "ratio_high": high,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "name", "wanted"),
    [
        (0.7955629960051738, "build seconds", "0.796"),
        (1628295168, "peak_bytes", "1.63 GB"),
        (20_000_000, "open bytes over import", "20 MB"),
        (1281167, "rows", "1,281,167"),
        (12345.678, "queries", "12,346"),
        (1.451e-06, "gap", "1.45e-06"),
        (0.0, "difference", "0"),
        (True, "whole", "True"),
        ("a|b", "settings", "a\\|b"),
    ],
)
def test_numbers_are_rounded(value: Any, name: str, wanted: str) -> None:
    assert shown(value, name) == wanted


def test_facts_of_the_same_contestants_stand_side_by_side() -> None:
    facts = {
        "rows": 100_000,
        "recall": {"ours": 1.0, "theirs": 0.9963},
        "build_seconds": {"ours": 0.99, "theirs": 20.95},
        "measured": [{"index": "flat", "peak_bytes": 2e9}, {"index": "ivf", "query_ms": 3}],
        "account": {"onnx": {"forward alone": 86.43}, "openvino": {"forward alone": 73.82}},
    }
    assert "\n".join(fact_tables(facts)).split("\n\n") == [
        "|  |  |\n|---|---|\n| rows | 100,000 |",
        "| index | peak bytes | query ms |\n|---|---|---|\n| flat | 2 GB |  |\n| ivf |  | 3 |",
        "| account | forward alone |\n|---|---|\n| onnx | 86.4 |\n| openvino | 73.8 |",
        "|  | recall | build seconds |\n|---|---|---|\n"
        "| ours | 1 | 0.99 |\n| theirs | 0.996 | 20.9 |\n",
    ]


def test_the_page_says_its_claims_first(tmp_path: Path) -> None:
    timings = [
        timing("peer", 2.0, 2.2, ratios=(1, 1, 1)),
        timing("ours", 0.5, 0.7, ratios=(3.514, 3.142, 4.0)),
        timing("a part of it", 0.1, 0.1, ratios=(21, 20, 22)),
    ]
    once = [timing("peer", 50.0, ratios=(1, 1, 1)), timing("ours", 10.0, ratios=(5, 5, 5))]
    for name, found in (("first", timings), ("second", once)):
        document = {"title": f"{name} run", "peer": "peer", "timings": found, "machine": MACHINE}
        (tmp_path / f"{name}.json").write_text(json.dumps(document | {"facts": {"rows": 7}}))
    headlines = {"second": ("ours",), "first": ("ours",), "third": ("ours",), "fourth": ()}
    write_page(tmp_path / "page.md", tmp_path, headlines, {"third": "not finished within 9 s"})
    page = (tmp_path / "page.md").read_text()
    top, *sections = page.split("\n## ")
    claims = [line for line in top.splitlines() if line.startswith("| ")][1:]
    assert claims == [
        "| second run: ours | peer | 5 | once |", "| first run: ours | peer | 3.51 | 3.14 to 4 |"
    ]  # fmt: skip
    assert top.count("Machine: processor of a test, threads 2.") == 1
    assert [section.splitlines()[0] for section in sections] == ["second", "first", "third"]
    assert "| ours | 0.6 | 3.51 | 3.14 to 4 |" in sections[1]
    assert "| a part of it | 0.1 | 21 | 20 to 22 |" in sections[1]
    assert "| rows | 7 |" in sections[1]
    assert "Not finished within 9 s." in sections[2]
    assert [path.name for path in tmp_path.glob("*.png")] == ["speed-first.png"]

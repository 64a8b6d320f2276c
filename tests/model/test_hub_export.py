"""A checkpoint in the hands of someone who has transformers and torch, and nothing of ours."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import all_files, assert_same_rows, assert_same_tensors, pixels, tiny_model
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import hf_knn
from hf_knn import KnnForImageClassification

FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {},
    "resnet": {"knn_pooling": "max", "k": 5},
    "convnext": {"head": "kernel", "head_features": 16, "head_components": 4},
}
CODE = {"configuration_hf_knn.py", "modeling_hf_knn.py"}
TRAVELS = Path(hf_knn.__file__).parent / "travels"
ALLOWED = {"torch", "transformers", "safetensors", "numpy"} | set(sys.stdlib_module_names)
PICKLE_ENDINGS = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}

STRANGER = """
import json, os, sys
sys.modules["hf_knn"] = None  # importing it raises ImportError, as where it is not installed
sys.modules["faiss"] = None
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

torch.set_num_threads(int(sys.argv[2]))  # sums are split by thread, so this is part of the bits
folder, report = Path(sys.argv[1]), {}
modules = Path(os.environ["HF_MODULES_CACHE"])
images = load_file(folder / "images.safetensors")["images"]
openers = {cls.__name__: cls for cls in (AutoModel, AutoModelForImageClassification)}

for name, opener in {"AutoConfig": AutoConfig, **openers}.items():
    for options in ({}, {"trust_remote_code": False}):
        try:
            opener.from_pretrained(folder / "vit", **options)
            report[f"refused {name} {options}"] = "it opened"
        except ValueError as error:
            report[f"refused {name} {options}"] = str(error)
report["code copied"] = [str(path) for path in modules.rglob("*_hf_knn.py")]
report["code loaded"] = [name for name in sys.modules if "transformers_modules." in name]

answers = {}
for family in sys.argv[3:]:
    for name, opener in openers.items():
        model = opener.from_pretrained(folder / family, trust_remote_code=True)
        with torch.no_grad():
            answers[f"{family} {name}"] = model(pixel_values=images).logits
        report[f"class {family} {name}"] = [type(model).__module__, type(model).__name__]
        report[f"rows {family} {name}"] = len(model.datastore)
    model.save_pretrained(folder / f"{family}-again")
save_file(answers, folder / "answers.safetensors")

classify = pipeline("image-classification", model=str(folder / "vit"), trust_remote_code=True)
scores = classify(Image.new("RGB", (40, 40), "red"), top_k=None)
report["pipeline"] = {entry["label"]: entry["score"] for entry in scores}
report["package loaded"] = [n for n in sys.modules if n.split(".")[0] in ("hf_knn", "faiss")]
(folder / "report.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def models() -> dict[str, KnnForImageClassification]:
    return {family: tiny_model(family, **values) for family, values in FAMILIES.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, models: Any) -> Path:
    """One folder per family, saved by a process that has the package."""
    root = tmp_path_factory.mktemp("hub")
    for family, model in models.items():
        model.save_pretrained(root / family)
    return root


@pytest.fixture(scope="module")
def stranger(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without the package and without faiss reports about the folders."""
    home = tmp_path_factory.mktemp("home")
    save_file({"images": pixels(5, seed=9)}, saved / "images.safetensors")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    private = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(saved), str(torch.get_num_threads()), *FAMILIES],
        env=kept | private | {"HF_HUB_OFFLINE": "1"},
        cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads((saved / "report.json").read_text())
    return report | {"stderr": result.stderr, "modules": home / "modules"}


def test_the_stranger_had_neither_package_nor_faiss(stranger):
    assert sorted(stranger["package loaded"]) == ["faiss", "hf_knn"]  # the two None entries


def test_without_trust_nothing_opens_and_no_code_runs(stranger):
    refusals = {name: text for name, text in stranger.items() if name.startswith("refused")}
    assert len(refusals) == 6
    assert [text for text in refusals.values() if "trust_remote_code=True" not in text] == []
    assert stranger["code copied"] == []
    assert stranger["code loaded"] == []


@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForImageClassification"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_remote_code_gives_the_same_bits(family, name, stranger, saved, models):
    answers = load_file(saved / "answers.safetensors")
    with torch.no_grad():
        wanted = models[family](pixel_values=pixels(5, seed=9)).logits
    assert torch.equal(answers[f"{family} {name}"], wanted)
    module, class_name = stranger[f"class {family} {name}"]
    assert module.startswith("transformers_modules.")
    assert class_name == "KnnForImageClassification"
    assert stranger[f"rows {family} {name}"] == 40


def test_remote_code_works_in_the_stock_pipeline(stranger):
    assert sorted(stranger["pipeline"]) == ["ant", "bee", "cat", "dog"]
    assert sum(stranger["pipeline"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_the_stranger_saved_again_is_whole(family, stranger, saved, models):
    again = saved / f"{family}-again"
    names = [
        set(all_files(place)) - {"datastore.faiss", "README.md"}  # of the package
        for place in (saved / family, again)
    ]
    assert names[0] == names[1]
    for name in CODE:
        assert (again / name).read_bytes() == (saved / family / name).read_bytes()
    config = json.loads((again / "config.json").read_text())
    assert (
        config["auto_map"] == json.loads((saved / family / "config.json").read_text())["auto_map"]
    )
    found = KnnForImageClassification.from_pretrained(again)
    assert_same_tensors(found, models[family])
    assert_same_rows(found.datastore, models[family].datastore)
    with torch.no_grad():
        pair = [m(pixel_values=pixels(5, seed=9)).logits for m in (found, models[family])]
    assert torch.equal(*pair)


# ---- the files ----------------------------------------------------------------------------------


def statements(tree: ast.AST, *, in_try: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements below a node; those inside `try:` only if asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif in_try or not isinstance(node, ast.Try):
            yield from statements(node, in_try=in_try)


def relative_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [n for n in statements(tree, in_try=True) if isinstance(n, ast.ImportFrom) and n.level]
    return {("." * (node.level - 1)) + (node.module or "") for node in found}


def absolute_imports(path: Path) -> set[str]:
    """Top-level names of the libraries that a file cannot do without."""
    names = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), in_try=False):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


def code_problems(folder: Path) -> list[str]:
    """What would keep the `.py` files of a checkpoint from working elsewhere."""
    found = []
    for path in sorted(folder.glob("*.py")):
        needed = relative_imports(path)
        found += [f"{path.name}: needs .{n}" for n in needed if not (folder / f"{n}.py").is_file()]
        found += [f"{path.name}: `from . import`" for name in needed if not name]
        if set(get_relative_imports(path)) != needed:
            found.append(f"{path.name}: the scanner sees {sorted(get_relative_imports(path))}")
        for scanned in (absolute_imports(path), get_imports(path)):
            found += [f"{path.name}: imports {name}" for name in scanned if name not in ALLOWED]
    return found


def is_pickle(path: Path) -> bool:
    """By ending, or by the first bytes: a pickle's protocol mark, or torch's zip."""
    start = path.read_bytes()[:4]
    is_marked = len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5
    return path.suffix in PICKLE_ENDINGS or is_marked or start == b"PK\x03\x04"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_two_files_of_code_are_saved(family, saved):
    assert {path.name for path in (saved / family).glob("*.py")} == CODE
    for name in CODE:
        assert (saved / family / name).read_bytes() == (TRAVELS / name).read_bytes()


def test_what_travels_can_be_read_in_an_hour(saved):
    assert sum(len((saved / "vit" / name).read_text().splitlines()) for name in CODE) <= 2400


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_auto_map_names_what_is_there(family, saved):
    auto_map = json.loads((saved / family / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    for target in auto_map.values():
        module, _, name = target.partition(".")
        tree = ast.parse((saved / family / f"{module}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_the_code_works_elsewhere(saved):
    assert code_problems(saved / "vit") == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("from .nowhere import X", "needs .nowhere"),
        ("from . import search", "`from . import`"),
        ("def f():\n    from .nowhere import X", "needs .nowhere"),
        ('"""Text.\n\n    from .other import X\n"""', "the scanner sees"),
        ("import filelock", "imports filelock"),
        ("def f():\n    import timm", "imports timm"),
        ("from hf_knn import Datastore", "imports hf_knn"),
    ],
)
def test_a_planted_problem_is_reported(line, problem, saved, tmp_path):
    for name in CODE:
        (tmp_path / name).write_bytes((saved / "vit" / name).read_bytes())
    with (tmp_path / "modeling_hf_knn.py").open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert [
        text
        for text in code_problems(tmp_path)
        if text.startswith(f"modeling_hf_knn.py: {problem}")
    ]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_pickle_in_the_folder(family, saved):
    files = [saved / family / name for name in all_files(saved / family)]
    assert len(files) >= 8
    assert [path.name for path in files if is_pickle(path)] == []


def test_a_pickle_would_be_seen(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "innocent.json")
    torch.save({"a": 1}, tmp_path / "old.json", _use_new_zipfile_serialization=False)
    (tmp_path / "weights.bin").write_bytes(b"")
    assert [is_pickle(path) for path in sorted(tmp_path.iterdir())] == [True, True, True]

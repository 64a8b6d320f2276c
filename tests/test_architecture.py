"""Imports go one way. The table below is the architecture; a new module must be added to it."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import hf_knn
from hf_knn.model.checkpoint import OWN_CODE

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_knn"

LAYERS = [
    {"configuration_knn", "functional", "heads", "storage", "manifest", "rows", "row_table"}
    | {"images", "ridge_state", "ridge_head", "receipts", "confidence", "flips"}
    | {"blobs", "processors", "first_pass", "faiss_index", "search", "indexing", "persistence"}
    | {"search_backend", "row_fingerprint", "datastore_reference", "thumbnails"}
    | {"milvus_client", "milvus_rows", "milvus_collection", "milvus_search", "milvus_index"},
    {"hub_files", "publishing", "model_card"},
    {"datastore_rows", "datastore_search", "datastore_changes", "datastore_opening"}
    | {
        "datastore_files",
        "datastore",
        "backbone",
        "milvus_load",
        "milvus_changes",
        "milvus_store",
        "milvus_reading",
        "pending_change",
    },
    {"checkpoint", "class_names"},
    {"following", "teaching", "explaining", "remembering"},
    {"modeling_knn"},
    {"pipeline_knn", "augmentation", "data", "collator", "features", "folds", "metrics"}
    | {"row_pictures"}
    | {"reading", "picture_keys", "feature_cache", "feature_table", "encoders"}
    | {"encoder_graphs", "encoding", "backend_choice", "serving"}
    | {"temperature", "ridge", "probe_settings", "probe_layers", "probe_factors"}
    | {
        "abstaining",
        "distributed_search",
        "probe_optimizers",
        "probe",
        "tuning",
        "votes",
        "fitting",
        "measuring",
        "plots",
    }
    | {"pages", "page_style", "findings", "prints", "alignment", "duplicates", "voices"}
    | {"label_errors", "outliers", "balance", "learning_curve", "checkup", "drawings"}
    | {"feature_map", "inspection"},
    {"training_args", "loss", "resume", "sealed_trainer", "hub_trainer", "trainer", "callbacks"}
    | {"training_rows", "fitting_at_once"},
    {"export", "differences", "console", "checkup_report", "doctor", "doctor_command"}
    | {
        "inspect_command",
        "training_command",
        "teach_command",
        "explain_command",
        "milvus_command",
        "demo_command",
        "cache_command",
        "cli",
    },
]
"""Modules of a layer import from their own layer and the ones above it in this list."""

INIT_IMPORTS = {"configuration_knn", "modeling_knn"}
ONLY_IN = {"faiss": "faiss_index", "datasets": "data"}
"""Libraries that one module alone imports."""

ENTRY_POINTS = ("configuration_knn", "modeling_knn")
"""What a checkpoint's auto_map names; with what they import, they are the Hub closure."""


class Import(NamedTuple):
    """One import statement: `from ..module import names` has level 2."""

    level: int
    module: str
    names: tuple[str, ...]


def imports_of(path: Path) -> list[Import]:
    """All imports of a file, also those inside functions, `try` and `if`."""
    return parse_imports(path.read_text(encoding="utf-8"))


@cache
def parse_imports(text: str) -> list[Import]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [Import(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            found.append(Import(node.level, node.module or "", names))
    return found


def arrows_of(path: Path) -> set[str]:
    """The modules of the package that a module imports."""
    return {found.module for found in imports_of(path) if found.level == 1 and found.module}


def closure_of(package: Path) -> set[str]:
    """The modules that travel with a checkpoint."""
    closure: set[str] = set()
    pending = set(ENTRY_POINTS)
    while pending:
        name = pending.pop()
        closure.add(name)
        pending |= arrows_of(package / f"{name}.py") - closure
    return closure


def package_violations(package: Path) -> list[str]:
    """What breaks the architecture in a folder of modules, one line each."""
    layer_of = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    paths = {path.stem: path for path in sorted(package.glob("*.py"))}
    found = [f"{path.name}: a sub-package" for path in package.iterdir() if is_package(path)]
    for name, path in paths.items():
        if name != "__init__" and name not in layer_of:
            found.append(
                f"{name}: not in LAYERS of tests/test_architecture.py; add it to its layer"
            )
        found += bad_statements(name, path)
        for target in sorted(arrows_of(path)):
            if target not in paths:
                found.append(f"{name} -> {target}: there is no such module")
            elif name == "__init__":
                if target not in INIT_IMPORTS:
                    found.append(f"{name} -> {target}: only {sorted(INIT_IMPORTS)} at import time")
            elif layer_of.get(target, 0) > layer_of.get(name, len(LAYERS)):
                found.append(f"{name} -> {target}: against the layers")
    try:
        TopologicalSorter({name: arrows_of(path) for name, path in paths.items()}).prepare()
    except CycleError as error:
        found.append(f"a cycle: {' -> '.join(error.args[1])}")
    return found


def bad_statements(name: str, path: Path) -> Iterator[str]:
    """Imports whose form or library is wrong for this module."""
    for level, module, names in imports_of(path):
        top = module.partition(".")[0]
        if level > 1 or (level == 1 and (not module or "." in module)):
            yield f"{name}: `from {'.' * level}{module} import …`, wanted `from .name import X`"
        if level == 1 and "*" in names:
            yield f"{name}: `from .{module} import *`"
        if level == 0 and top == PACKAGE.name:
            yield f"{name}: absolute import of {module}, wanted `from .name import X`"
        if level == 0 and ONLY_IN.get(top, name) != name:
            yield f"{name}: imports {top}, which only {ONLY_IN[top]} may"


def is_package(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.py"))


def user_violations(folder: Path, public: list[str]) -> list[str]:
    """Where scripts outside the package use anything but its public names."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for level, module, names in imports_of(path):
            if level or module.partition(".")[0] != PACKAGE.name:
                continue
            wanted = names if module == PACKAGE.name and names else (module,)
            private = [name for name in wanted if name not in public]
            if private:
                found.append(f"{path.name}: {private}, wanted `from hf_knn import X`, X public")
    return found


def test_the_package_keeps_its_layers():
    assert package_violations(PACKAGE) == []


@pytest.mark.parametrize("folder", ["benchmark", "space", "examples"])
def test_scripts_use_public_names_only(folder):
    assert user_violations(ROOT / folder, hf_knn.__all__) == []


def test_the_closure_is_below_the_rest():
    """What travels with a checkpoint is what lies at or below the model, and all of it."""
    assert closure_of(PACKAGE) == set().union(*LAYERS[:6])
    assert sorted(OWN_CODE) == sorted(f"{name}.py" for name in closure_of(PACKAGE))


def test_public_names_are_said_once():
    """`__all__` names what design.md promises, each of a module in the table."""
    promised = {"KnnConfig", "KnnForImageClassification", "KnnImageClassifierOutput"}
    promised |= {"Datastore", "Neighbors", "KnnTrainer", "KnnTrainingArguments"}
    promised |= {"MilvusDatastore", "SearchBackend", "ShardedDatastore"}
    promised |= {"extract_features", "tune"}
    promised |= {"knn_log_probs", "blend_log_probs", "knn_loss_weights"}
    # what the examples and benchmarks of heads on features need beyond it
    promised |= {"ProbeConfig", "ProbeGrid", "ProbeSettings", "FactorControl", "fit_ridge"}
    promised |= {"ProbeScore", "train_probes", "score_probes", "choose_probe"}
    promised |= {
        "default_grid",
        "KnnImageClassificationPipeline",
        "datastore_as_dataset",
        "draw_neighbors",
    }
    # what the Space needs beyond it
    promised |= {"BadImageError", "Explanation", "decode_image", "PictureEncoder"}
    promised |= {"inspect_datastore", "map_svg", "place_features", "load_splits"}
    promised |= {"few_shots", "few_rows", "stratified_folds", "out_of_fold", "score_labels"}
    promised |= {"find_pairs", "print_of", "score_log_probs"}
    # what the page of a benchmark shares with those of doctor and explain
    promised |= {"PAGE_STYLE", "thumbnail"}
    assert len(hf_knn.__all__) == len(promised)
    assert set(hf_knn.__all__) == promised
    modules = set().union(*LAYERS)
    assert set(hf_knn._LAZY.values()) <= modules


# ---- the checks can fail ------------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "hf_knn", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "hf_knn"


def test_the_copy_is_clean_before_anything_is_planted(planted):
    assert package_violations(planted) == []


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("functional", "from .datastore import Datastore", "functional -> datastore: against"),
        ("datastore", "from .modeling_knn import KnnHead", "datastore -> modeling_knn: against"),
        ("backbone", "from .checkpoint import AUTO_MAP", "backbone -> checkpoint: against"),
        ("modeling_knn", "from .data import prepare", "modeling_knn -> data: against"),
        ("data", "from .trainer import KnnTrainer", "data -> trainer: against"),
        ("trainer", "from .cli import main", "trainer -> cli: against"),
        ("rows", "def late():\n    from .cli import main", "rows -> cli: against"),
        ("rows", "if TYPE_CHECKING:\n    from .cli import main", "rows -> cli: against"),
        ("storage", "from .manifest import Manifest", "a cycle: "),
        ("rows", "import faiss", "rows: imports faiss"),
        ("images", "from datasets.features import Image", "images: imports datasets"),
        ("checkpoint", "from . import rows", "checkpoint: `from . import …`"),
        ("checkpoint", "from ..hf_knn import rows", "checkpoint: `from ..hf_knn import …`"),
        ("checkpoint", "from hf_knn.rows import shown", "checkpoint: absolute import of hf_knn"),
        ("checkpoint", "import hf_knn", "checkpoint: absolute import of hf_knn"),
        ("checkpoint", "from .rows import *", "checkpoint: `from .rows import *`"),
        ("checkpoint", "from .nowhere import X", "checkpoint -> nowhere: there is no such"),
        ("__init__", "from .datastore import Datastore", "__init__ -> datastore: only"),
        ("brand_new", "x = 1", "brand_new: not in LAYERS"),
    ],
)
def test_a_planted_import_is_reported(name, line, message, planted):
    path = planted / f"{name}.py"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{old}\n{line}\n", encoding="utf-8")
    assert [text for text in package_violations(planted) if text.startswith(message)]


def test_a_module_that_is_not_in_the_table_says_what_to_do(planted):
    (planted / "brand_new.py").write_text("")
    (message,) = package_violations(planted)
    assert "add it to its layer" in message
    assert "tests/test_architecture.py" in message


def test_a_sub_package_is_reported(planted):
    (planted / "deep").mkdir()
    (planted / "deep" / "module.py").write_text("")
    assert package_violations(planted) == ["deep: a sub-package"]


@pytest.mark.parametrize(
    ("line", "is_public"),
    [
        ("from hf_knn import Datastore, tune", True),
        ("from hf_knn import Datastore as D", True),
        ("from datasets import load_dataset", True),
        ("from hf_knn import functional", False),
        ("from hf_knn.functional import knn_log_probs", False),
        ("from hf_knn.datastore import Datastore", False),
        ("import hf_knn", False),
        ("import hf_knn.functional as f", False),
        ("def f():\n    from hf_knn import has_faiss", False),
    ],
)
def test_a_private_name_in_a_script_is_reported(line, is_public, tmp_path):
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "script.py").write_text(line)
    found = user_violations(tmp_path, hf_knn.__all__)
    assert (found == []) == is_public


# ---- the console script -------------------------------------------------------------------------


def imported_by(module: str, folder: Path) -> set[str]:
    """What importing a module of a folder imports, seen from a fresh interpreter."""
    code = f"import {module}, sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return set(result.stdout.split())


def test_the_console_script_is_light():
    loaded = imported_by("hf_knn_cli", ROOT)
    assert {"hf_knn_cli.train", "hf_knn_cli.use", "typer"} <= loaded
    assert loaded & {"torch", "transformers", "hf_knn", "datasets", "faiss", "numpy"} == set()


def test_importing_the_package_takes_little_beyond_transformers():
    """What is needed later is imported later: seconds cannot be asserted, but modules can."""
    loaded = imported_by("hf_knn", ROOT)
    assert {"hf_knn.model.modeling", "torch", "transformers"} <= loaded
    late = {"faiss", "datasets", "evaluate", "matplotlib", "pandas", "typer"}
    late |= {"onnxruntime", "openvino", "pymilvus", "transformers.trainer"}
    late |= {
        "transformers.image_processing_utils",
        "hf_knn.training.trainer",
        "hf_knn.features.extract",
    }
    assert loaded & late == set()


def test_a_heavy_console_script_would_be_noticed(tmp_path):
    (tmp_path / "heavy.py").write_text("import typer\nimport numpy\n")
    assert "numpy" in imported_by("heavy", tmp_path)

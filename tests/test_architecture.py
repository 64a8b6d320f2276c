"""What `lint-imports` cannot say: public names, weight of imports, sizes, types.

Layers, circles and what travels are contracts of import-linter in pyproject.toml (`make lint`).
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import hf_knn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_knn"
SUB_PACKAGES = ("data", "store", "fit", "checkup", "labelling")
"""Public ones, with names of their own."""

ONLY_IN = {
    "faiss": ("store/faiss.py",),
    "datasets": ("data/loading.py",),
    # whose options are declared there, and which speaks through what guards the terminal
    "hf_knn_cli": (
        "commands/console.py",
        "commands/heads.py",
        "commands/thumbnails.py",
        "commands/train.py",
    ),
}
"""What one module alone imports."""

MOST_FILES, MOST_LINES = 193, 500
"""90 files held what 0.2 could; each capability since brings its own."""


def sources(package: Path = PACKAGE) -> dict[str, str]:
    """The text of each module, without what is generated from `core`."""
    paths = [path for path in sorted(package.rglob("*.py")) if "travels" not in path.parts]
    return {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in paths}


def imports_of(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every absolute import, also those inside functions: module, and names taken from it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or "", tuple(alias.name for alias in node.names)


# ---- public names -------------------------------------------------------------------------------


def test_public_names_are_what_design_promises() -> None:
    promised = {"KnnConfig", "KnnForImageClassification", "KnnImageClassifierOutput", "Datastore"}
    promised |= {"Neighbors", "KnnTrainer", "KnnTrainingArguments", "extract_features", "tune"}
    promised |= {"load_splits", "knn_log_probs", "blend_log_probs", "knn_loss_weights"}
    more = {"BadImageError", "Explanation", "KnnImageClassificationPipeline", "MilvusDatastore"}
    more |= {"PictureEncoder", "SearchBackend", "datastore_as_dataset"}
    assert set(hf_knn.__all__) == promised | more
    assert len(hf_knn.__all__) == 20
    assert dir(hf_knn) == sorted(hf_knn.__all__)


@pytest.mark.parametrize("name", [f"hf_knn.{name}" for name in SUB_PACKAGES] + ["hf_knn"])
def test_every_public_name_is_there_and_nothing_else(name: str) -> None:
    package = import_module(name)
    for public in package.__all__:
        found = getattr(package, public)
        assert found is not None, public
        # a module of that name would hide it as soon as it is imported
        assert not isinstance(found, ModuleType), public
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("name", sorted(hf_knn._MOVED))
def test_names_of_version_one_still_work_with_a_word(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"hf_knn\.{hf_knn._MOVED[name]}\.{name}"):
        found = getattr(hf_knn, name)
    assert found is getattr(import_module(f"hf_knn.{hf_knn._MOVED[name]}"), name)


def test_public_sub_packages_are_attributes() -> None:
    code = (
        "import hf_knn; print(*(getattr(hf_knn, n).__name__ for n in ('fit', 'checkup', 'data')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["hf_knn.fit", "hf_knn.checkup", "hf_knn.data"]


def private_imports(text: str) -> list[str]:
    """What a script outside the package takes that is not public."""
    found = []
    for module, names in imports_of(text):
        if module.partition(".")[0] != "hf_knn":
            continue
        is_public = module in ("hf_knn", *(f"hf_knn.{name}" for name in SUB_PACKAGES))
        allowed = import_module(module).__all__ if is_public and names else []
        found += [f"{module}.{name}" for name in names or ("*",) if name not in allowed]
    return found


@pytest.mark.parametrize("folder", ["benchmark", "space", "examples"])
def test_scripts_use_public_names_only(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    assert {p.name: found for p in paths if (found := private_imports(p.read_text("utf-8")))} == {}


@pytest.mark.parametrize(
    ("line", "is_public"),
    [
        ("from hf_knn import Datastore, tune", True),
        ("from hf_knn.fit import fit_ridge", True),
        ("from datasets import load_dataset", True),
        ("from hf_knn import fit_ridge", False),
        ("from hf_knn.fit import ridge", False),
        ("from hf_knn.core.votes import knn_log_probs", False),
        ("import hf_knn", False),
        ("def f():\n    from hf_knn.store.faiss import has_faiss", False),
    ],
)
def test_a_private_name_in_a_script_would_be_seen(line: str, is_public: bool) -> None:
    assert (private_imports(line) == []) == is_public


# ---- one place for each library -----------------------------------------------------------------


def test_one_module_imports_each_heavy_library() -> None:
    found: dict[str, set[str]] = {}
    for name, text in sources().items():
        for module, _ in imports_of(text):
            found.setdefault(module.partition(".")[0], set()).add(name)
    assert {library: sorted(found[library]) for library in ONLY_IN} == {
        library: list(places) for library, places in ONLY_IN.items()
    }


def imported_by(module: str) -> set[str]:
    """What importing a module imports, seen from a fresh interpreter."""
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return set(done.stdout.split())


def test_importing_the_package_takes_little_beyond_transformers() -> None:
    """What is needed later is imported later: seconds cannot be asserted, but modules can."""
    loaded = imported_by("hf_knn, hf_knn.fit, hf_knn.data, hf_knn.checkup, hf_knn.store")
    assert {"hf_knn.model.modeling", "torch", "transformers"} <= loaded
    late = {"faiss", "datasets", "evaluate", "matplotlib", "pandas", "typer", "sklearn"}
    late |= {"onnxruntime", "openvino", "pymilvus", "transformers.trainer"}
    late |= {"transformers.image_processing_utils", "hf_knn.training.trainer"}
    late |= {"hf_knn.features.extract", "hf_knn.milvus.datastore"}
    assert loaded & late == set()


# ---- sizes and types ----------------------------------------------------------------------------


def test_nothing_but_sub_packages_lies_at_the_top() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "py.typed"}


def test_one_idea_a_file() -> None:
    lines = {name: len(text.splitlines()) for name, text in sources().items()}
    modules = {name: n for name, n in lines.items() if not name.endswith("__init__.py")}
    assert len(modules) <= MOST_FILES
    assert {name: n for name, n in modules.items() if n > MOST_LINES} == {}


def untyped(text: str) -> list[str]:
    """Parameters called model or store, in any form, that are `Any` or nothing at all."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found += [
                f"{node.name}: {parameter.arg}"
                for parameter in parameters
                if parameter.arg in ("model", "store", "datastore")
                and (parameter.annotation is None or "Any" in ast.unparse(parameter.annotation))
            ]
    return found


@pytest.mark.parametrize("folder", ["hf_knn", "hf_knn_cli", "space", "benchmark"])
def test_models_and_stores_have_types(folder: str) -> None:
    texts = sources(ROOT / folder)
    assert texts
    assert {name: found for name, text in texts.items() if (found := untyped(text))} == {}


def test_an_untyped_model_would_be_seen() -> None:
    assert untyped("def f(model: Any): ...") == ["f: model"]
    assert untyped("def f(x, *, store=None): ...") == ["f: store"]
    assert untyped("def f(model: Model, other: Any): ...") == []

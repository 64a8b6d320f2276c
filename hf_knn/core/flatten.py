"""Writes the code that travels with a checkpoint: the modules of this folder, as two files.

`python -m hf_knn.core.flatten` writes `hf_knn/travels/` anew; a test compares. The result is a pure
function of the sources, the same on every machine. transformers finds what travels by a regular
expression, which folders and docstrings that look like imports would break: what it could not take
is refused here.
"""

import ast
import hashlib
import re
import sys
import textwrap
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent
_NOT_SOURCES = ("__init__", "flatten", "lazy")
TARGET = SOURCES.parent / "travels"
HEADER = """# {title}
#
# Made from hf_knn/core of the package hf-knn; do not edit. Sources: sha256 {digest}.
# `hf-knn code FOLDER` says whether these files are those of the installed package.
# Licence: Apache-2.0.
"""
PUBLIC = ("KnnConfig", "KnnForImageClassification", "KnnImageClassifierOutput", "Neighbors")
_CALLED = ("from_pretrained", "save_pretrained", "forward")
"""Whose docstrings travel whole; others by their first paragraph, private constants without."""

_LOOKS_LIKE_AN_IMPORT = re.compile(r"^\s*(from\s+\.|import\s+\.)", re.MULTILINE)


class Output(NamedTuple):
    """A file to be written: its name, its title, and the definitions that it must hold."""

    name: str
    title: str
    roots: tuple[str, ...]


OUTPUTS = (
    Output("configuration_hf_knn", "The configuration of a k-NN image classifier.", ("KnnConfig",)),
    Output(
        "modeling_hf_knn",
        "A k-NN image classifier: what a checkpoint needs where the package is not installed.",
        ("KnnForImageClassification",),
    ),
)
"""Lower files first: what a lower file holds is imported from it."""


@dataclass
class Piece:
    """A statement with the comments above it: what it defines, and the names that it reads."""

    names: tuple[str, ...]
    text: str
    reads: set[str]


@dataclass
class Module:
    """A source file: its docstring, what it imports, and its statements."""

    doc: str
    outside: dict[str, str] = field(default_factory=dict)
    siblings: set[str] = field(default_factory=set)
    pieces: list[Piece] = field(default_factory=list)


def read_module(path: Path) -> Module:
    """Parses a source file.

    Raises:
        SyntaxError: for what cannot be flattened: another import of a sibling than
            ``from .name import X``, or a statement that is no definition.
    """
    text = path.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    doc = ast.get_docstring(tree)
    if doc is None:
        raise SyntaxError(f"Expected {path.name} to begin with a docstring.")
    module = Module(doc)
    for node in tree.body[1:]:
        place = f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Import):
            named = {alias.asname or alias.name: ast.unparse(alias) for alias in node.names}
            module.outside |= {name: f"import {alias}" for name, alias in named.items()}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            named = {alias.asname or alias.name: ast.unparse(alias) for alias in node.names}
            module.outside |= {n: f"from {node.module} import {a}" for n, a in named.items()}
        elif isinstance(node, ast.ImportFrom):
            if node.level != 1 or not node.module or any(alias.asname for alias in node.names):
                raise SyntaxError(f"Expected `from .name import X` in {place}.")
            module.siblings.add(node.module)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if not module.pieces[-1].names[0].startswith("_"):  # the docstring of a constant
                module.pieces[-1].text += "\n" + _text_of(lines, node)
        elif names := _names_of(node):
            module.pieces.append(Piece(names, _text_of(lines, node), _reads_of(node)))
        else:
            raise SyntaxError(f"Expected a definition or an import in {place}.")
    return module


def flatten(folder: Path = SOURCES) -> dict[str, str]:
    """The texts of the files that travel.

    Args:
        folder: of the sources.

    Returns:
        File name to text.

    Raises:
        NameError: for a name that is defined or imported in two ways, or that nobody reaches.
        SyntaxError: see `read_module`.
    """
    paths = [path for path in sorted(folder.glob("*.py")) if path.stem not in _NOT_SOURCES]
    modules = {path.stem: read_module(path) for path in paths}
    graph = {name: sorted(module.siblings) for name, module in modules.items()}
    order = list(TopologicalSorter(graph).static_order())
    defined, outside = _collect(modules)
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()
    texts: dict[str, str] = {}
    home: dict[str, str] = {}
    for output in OUTPUTS:
        mine = _reach(output.roots, defined) - home.keys()
        pieces, sections = [], list[str]()
        for name in order:
            found = [piece for piece in modules[name].pieces if piece.names[0] in mine]
            if found:
                sections.append(_banner(name, modules[name].doc))
                sections += [piece.text for piece in found]
                pieces += found
        reads = set[str]().union(*(piece.reads for piece in pieces))
        lower = sorted(reads & home.keys())
        imports = _merged({outside[name] for name in reads & outside.keys()})
        if lower:
            names = textwrap.fill(", ".join(lower), 96, break_on_hyphens=False)
            names = textwrap.indent(names, "    ")
            imports += ["", f"from .{OUTPUTS[0].name} import (\n{names}\n)"]
        header = HEADER.format(title=output.title, digest=digest)
        text = "\n".join([header, *imports, *_spaced(sections)]) + "\n"
        texts[f"{output.name}.py"] = _checked(_shortened(text), f"{output.name}.py")
        home |= dict.fromkeys(mine, output.name)
    unreached = sorted(defined.keys() - home.keys())
    if unreached:
        raise NameError(f"Expected every definition to be reached, but {unreached} are not.")
    return texts


def _names_of(node: ast.stmt) -> tuple[str, ...]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return (node.name,)
    if isinstance(node, ast.Assign):
        return tuple(n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return (node.target.id,)
    if isinstance(node, ast.Try):
        return tuple(name for part in node.body for name in _names_of(part))
    return ()


def _text_of(lines: list[str], node: ast.stmt) -> str:
    """The source of a statement with its decorators and the comments right above it."""
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while start and lines[start - 1].startswith("#"):
        start -= 1
    return "\n".join(lines[start : node.end_lineno])


def _reads_of(node: ast.stmt) -> set[str]:
    """Names that a statement reads, those in quoted annotations too."""
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    for part in ast.walk(node):
        for hint in (getattr(part, "annotation", None), getattr(part, "returns", None)):
            for text in ast.walk(hint) if hint is not None else ():
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    quoted = ast.walk(ast.parse(text.value))
                    found |= {name.id for name in quoted if isinstance(name, ast.Name)}
    return found


def _collect(modules: dict[str, Module]) -> tuple[dict[str, Piece], dict[str, str]]:
    """What is defined, and what is imported from outside: each name once."""
    defined: dict[str, Piece] = {}
    outside: dict[str, str] = {}
    for name, module in modules.items():
        for piece in module.pieces:
            for symbol in piece.names:
                if symbol in defined:
                    raise NameError(f"Expected one `{symbol}`, but {name}.py has another.")
                defined[symbol] = piece
        for symbol, statement in module.outside.items():
            if outside.setdefault(symbol, statement) != statement:
                raise NameError(f"Expected one `{symbol}`, but got {statement} in {name}.py.")
    both = sorted(outside.keys() & defined.keys())
    if both:
        raise NameError(f"Expected {both} to be defined or imported, not both.")
    return defined, outside


def _reach(roots: tuple[str, ...], defined: dict[str, Piece]) -> set[str]:
    seen, waiting = set[str](), set(roots)
    while waiting:
        name = waiting.pop()
        seen |= set(defined[name].names)
        waiting |= (defined[name].reads & defined.keys()) - seen
    return seen


def _banner(name: str, doc: str) -> str:
    return f"# ---- {name}.py: {doc.partition(chr(10))[0]}"


def _merged(statements: set[str]) -> list[str]:
    """Import statements, those of one module as one, the standard library first."""
    named: dict[str, list[str]] = {}
    for statement in sorted(statements):
        if statement.startswith("from "):
            module, _, name = statement.removeprefix("from ").partition(" import ")
            named.setdefault(module, []).append(name)
    found = sorted(text for text in statements if text.startswith("import "))
    found += [f"from {module} import {', '.join(sorted(names))}" for module, names in named.items()]
    groups: tuple[list[str], list[str]] = ([], [])
    for text in found:
        groups[text.split()[1].partition(".")[0] not in sys.stdlib_module_names].append(text)
    return [*groups[0], "", *groups[1]]


def _spaced(sections: list[str]) -> list[str]:
    """One blank line around definitions, two around modules, none between plain constants."""
    found, before = list[str](), ""
    for text in sections:
        is_close = _is_constant(text) and _is_constant(before) and not before.endswith('"""')
        blank = "" if is_close else "\n\n" if text.startswith("# ----") else "\n"
        found.append(blank + text)
        before = text
    return found


def _is_constant(text: str) -> bool:
    code = next((line for line in text.splitlines() if not line.startswith("#")), "")
    return bool(code) and not code.startswith(("@", "class ", "def "))


def _shortened(text: str) -> str:
    """With the first paragraph only of each docstring that is not of a public class."""
    tree, lines = ast.parse(text), text.splitlines()
    cuts: list[tuple[int, int, str]] = []
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        waiting += list(ast.iter_child_nodes(node))
        if getattr(node, "name", "") in (*PUBLIC, *_CALLED):
            continue
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
            continue
        doc = body[0].value
        if isinstance(doc, ast.Constant) and isinstance(doc.value, str) and "\n\n" in doc.value:
            first = lines[doc.lineno - 1 : doc.end_lineno]
            cut = first.index("")
            cuts.append((doc.lineno - 1, doc.end_lineno or 0, "\n".join(first[:cut]) + '"""'))
    for start, end, short in sorted(cuts, reverse=True):
        lines[start:end] = short.splitlines()
    return "\n".join(lines) + "\n"


def _checked(text: str, name: str) -> str:
    """Refuses lines of docstrings that the import scanner of transformers would follow."""
    compile(text, name, "exec")
    own = {f"from .{output.name} import" for output in OUTPUTS}
    for line in text.splitlines():
        if _LOOKS_LIKE_AN_IMPORT.match(line) and not any(line.startswith(start) for start in own):
            raise SyntaxError(f"Expected no line that looks like an import in {name}, but: {line}")
    return text


def main() -> None:
    """Writes the files."""
    TARGET.mkdir(exist_ok=True)
    for name, text in flatten().items():
        (TARGET / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()

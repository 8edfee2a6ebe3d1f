"""The house: folders import each other in one direction only, and so do files."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path): path
    for folder in ("medray", "serve", "jobs", "studies")
    for path in (ROOT / folder).rglob("*.py")
}


def imported(path):
    """The modules of this project that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text())
    for_types = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    tree.body = [node for node in tree.body if node not in for_types]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                yield from (name for name in (f"{node.module}.{alias.name}", node.module) if name in MODULES)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def room_of(path):
    if path.name == "__main__.py":  # a program, which nothing imports
        return path.relative_to(ROOT).as_posix()
    return path.parent.relative_to(ROOT).as_posix()


def graph(name_of):
    edges = {}
    for path in MODULES.values():
        own = name_of(path)
        edges.setdefault(own, set()).update(name_of(MODULES[module]) for module in imported(path))
        edges[own].discard(own)
    return edges


@pytest.mark.parametrize("name_of", [room_of, module_of], ids=["folders", "files"])
def test_imports_go_in_no_circle(name_of):
    graphlib.TopologicalSorter(graph(name_of)).prepare()  # raises CycleError, which names the circle


def test_the_package_needs_none_of_the_scripts():
    outside = {
        (module, name)
        for module, path in MODULES.items()
        if module.startswith("medray")
        for name in imported(path)
        if not name.startswith("medray")
    }
    assert not outside


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("medray/config", "medray/running"),
        ("medray/running", "medray/inference"),
        ("medray/images", "medray/ingest/readers"),
        ("medray/ingest/readers", "medray/ingest"),
        ("medray/storage", "medray/inference"),
        ("medray/models", "medray/data"),
        ("medray/data", "medray/train"),
        ("medray/train", "medray/rating_model"),
        ("medray/inference", "medray/evaluation"),
        ("medray/rating_model", "medray/methods/shared"),
        ("medray/evaluation", "medray/methods/shared"),
        ("medray/methods/shared", "medray/methods/self_train"),
        ("medray/methods/shared", "medray/serving"),
        ("medray/serving", "serve"),
    ],
)
def test_lower_floors_do_not_import_higher_ones(lower, higher):
    rooms = graph(room_of)
    assert {lower, higher} <= rooms.keys()
    seen, waiting = set(), [lower]
    while waiting:
        room = waiting.pop()
        waiting += rooms.get(room, set()) - seen
        seen.add(room)
    assert higher not in seen

#!/usr/bin/env python3
"""Print how the package is built: lines by room, import circles, modules outside every room, and what a run loads.

usage: tools/structure.py [TREE] [--before TREE] [--loaded] [--json]

Reads the source alone: nothing of the package is imported, so any commit's tree can be measured
(`git worktree add --detach ../old COMMIT; tools/structure.py --before ../old` prints both). `--loaded` also trains one step of
chat with LoRA on a tiny model in each tree, and prints how many modules its two processes imported, by room.

This is a report, not a target. `tests/packaging/test_structure.py` holds the two properties that must not change: no import
circles, even inside functions, and no module at the root of the package that belongs into a folder.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.loaded import PACKAGE, Loaded, loaded, room

HOME = Path(__file__).resolve().parents[1]
AT_THE_ROOT = frozenset({"__init__", "__main__"})
ALIAS_LINES = 15  # worker.py may stay as an alias for jobs that were queued with an earlier version
LONGEST = 5


@dataclass
class Structure:
    """One tree, measured."""

    loose: list[str] = field(default_factory=list)
    circles: list[list[str]] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    longest: list[tuple[str, int]] = field(default_factory=list)

    def numbers(self) -> dict[str, int]:
        return {
            "loose_modules": len(self.loose),
            "circles": len(self.circles),
            "lines": sum(self.lines.values()),
        }


def measure(tree: Path) -> Structure:
    """Read every module of the package in `tree`."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted((tree / PACKAGE).rglob("*.py"))}
    parsed = {path: ast.parse(text, str(path)) for path, text in sources.items()}
    lengths = {path.relative_to(tree): len(text.splitlines()) for path, text in sources.items()}
    lines: Counter[str] = Counter()
    for path, length in lengths.items():
        lines[room(path.relative_to(PACKAGE))] += length
    return Structure(
        loose=loose_modules(tree),
        circles=circles(import_graph(tree, parsed)),
        lines=dict(lines.most_common()),
        longest=[(path.as_posix(), length) for path, length in Counter(lengths).most_common(LONGEST)],
    )


def loose_modules(tree: Path) -> list[str]:
    loose = []
    for path in sorted((tree / PACKAGE).glob("*.py")):
        alias = path.stem == "worker" and len(path.read_text(encoding="utf-8").splitlines()) <= ALIAS_LINES
        if path.stem not in AT_THE_ROOT and not alias:
            loose.append(path.stem)
    return loose


def import_graph(tree: Path, parsed: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """Return which module imports which, also inside functions, but not for annotations alone."""
    names = {path: ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__") for path in parsed}
    modules = set(names.values())
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for path, module in parsed.items():
        module_name = names[path]
        for node in run_time_nodes(module):
            match node:
                case ast.Import(names=aliases):
                    targets = [alias.name for alias in aliases]
                case ast.ImportFrom(module=source, names=aliases, level=level):
                    if level:
                        package = module_name.split(".") if path.name == "__init__.py" else module_name.split(".")[:-1]
                        source = ".".join([*package[: len(package) - level + 1], *([source] if source else [])])
                    targets = [
                        whole if (whole := f"{source}.{alias.name}") in modules else str(source) for alias in aliases
                    ]
                case _:
                    continue
            graph[module_name] |= {target for target in targets if target in modules and target != module_name}
    return graph


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes below `node`, without the bodies of `if TYPE_CHECKING:`."""
    pending = [node]
    while pending:
        for child in ast.iter_child_nodes(pending.pop()):
            if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
                yield child
                pending.append(child)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Find strongly connected groups of at least two modules (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for name in sorted(graph):
        if name not in index:
            visit(name)
    return sorted(groups)


def table(title: str, sections_before: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> str:
    """Return the sections of a tree beside those of `sections_before`; rows of either."""
    rows = [("", title, "now")]
    for heading, counts in now.items():
        earlier = sections_before.get(heading, {})
        rows += [(heading, "", "")] if heading else []
        for name in dict.fromkeys([*counts, *earlier]):
            values = (str(side.get(name, "")) for side in (earlier, counts))
            rows.append(("  " * bool(heading) + name, *values))
        rows.append(("", "", ""))
    widest = max(len(row[0]) for row in rows)
    return "\n".join(f"{a:<{widest}}  {b:>9}  {c:>7}".rstrip() for a, b, c in rows).rstrip()


def sections(structure: Structure, run: dict[str, Loaded]) -> dict[str, dict[str, int]]:
    """Return what the table prints of a tree, by heading."""
    printed = {"": structure.numbers()}
    for role, process in run.items():
        if (unused := process.of_unused_rooms()) is not None:
            printed[""][f"files of unused rooms, {role}"] = len(unused)
        by_room = dict(process.by_room().most_common())
        printed[f"modules loaded by the {role}"] = {"all": process.modules, PACKAGE: len(process.files)} | by_room
    return printed | {"lines by room": structure.lines, "longest files": dict(structure.longest)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tree", nargs="?", type=Path, default=HOME)
    parser.add_argument("--before", metavar="TREE", type=Path, help="print this tree's numbers beside those of TREE")
    parser.add_argument("--loaded", action="store_true", help="train one step, and count the modules that it imports")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    structure = measure(options.tree.resolve())
    if options.json:
        details = {"by_room": structure.lines, "longest": dict(structure.longest), "circles": structure.circles}
        print(json.dumps(structure.numbers() | details | {"loose": structure.loose}, indent=2))
        return 0
    trees = {
        title: sections(measure(tree.resolve()), loaded(tree.resolve()) if options.loaded else {})
        for title, tree in {"before": options.before, "now": options.tree}.items()
        if tree is not None
    }
    print(table("before" if options.before else "", trees.get("before", {}), trees["now"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

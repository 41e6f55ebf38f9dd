#!/usr/bin/env python3
"""Count what keeps the package from being a house of rooms, and let each count fall only.

usage: tools/ratchet.py [TREE] [--before TREE] [--loaded] [--json] [--sites COUNT] [--update [--raise COUNT]]

Reads the source alone: nothing of the package is imported, so that any commit's tree can be measured
(`git worktree add --detach ../old COMMIT; tools/ratchet.py --before ../old` prints both). Without a flag it prints a table and
compares it with `tools/ratchet.json`: a count above the committed one exits 1. `--sites branches.task` lists where a count
comes from, `--update` writes the counts that fell; one that rose is written only when `--raise` names it. `lines` is a limit
that is lowered by naming it as well: moving code adds lines before it removes them. `--loaded` also trains one step of chat with
LoRA on a tiny model in each tree, and prints how many modules its two processes had imported, by room.

Counts:
- branches.KIND: places that ask for the class of a task, method, launcher, ... (of its configuration, or the registered one)
  outside the rooms of that kind: `isinstance`,
  `match` with cases of such classes, `type(x)`, tables by class. branches.cases counts the cases of all these `match`.
- branches.by_name: comparisons with, and tables by, `config.task.name`. branches.by_field: `getattr` and `hasattr` of a
  section: "has it this field?" is "is it of this class?".
- branches.reasoned: a line that ends in `# branch: REASON` counts here alone.
- loose_modules: modules at the root of the package that belong into a folder.
- circles: groups of modules that import each other, imports inside functions included.
- dialect: identifiers one part of which is a word that the field does not use.
- lines and the longest files.
- with `--loaded`, files of unused rooms: what each process imported of tasks and methods other than chat and LoRA, their keys
  and rules left out. A tree without rooms has no such number.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import json
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.loaded import PACKAGE, Loaded, loaded, room

HOME = Path(__file__).resolve().parents[1]
RECORD = "tools/ratchet.json"

# The configuration section of a kind and the folder of its rooms. Sections of one letter, or objects of another kind that
# happen to be called so, do not exist in the package.
ROOMS = {
    "task": "tasks",
    "method": "methods",
    "launch": "launch",
    "optimizer": "optim",
    "schedule": "optim",
    "parallel": "parallel",
    "sweep": "sweep",
}
# Decorators of registered classes. Those of the other kinds are called as classes of torch are: Linear, Tensor, ...
REGISTERED = {"task": "task", "method": "method", "launcher": "launch"}
# Folders of `launch/` are rooms, its other files are what launchers share. A method may be one file.
FILES_ARE_ROOMS = frozenset({"method", "optimizer", "schedule", "parallel"})
DIALECT = re.compile("(un)?(told|shown|asked|wanted|settled?|aside|torn|said|beforehand|handed)", re.IGNORECASE)
AT_THE_ROOT = frozenset({"__init__", "__main__"})
ALIAS_LINES = 15  # worker.py may stay as an alias for jobs that were queued with an earlier version
REASON = re.compile(r"#\s*branch:\s*\S")
LONGEST = 5


@dataclass(frozen=True)
class Site:
    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@dataclass
class Counts:
    """One tree, measured."""

    branches: dict[str, list[Site]] = field(default_factory=dict)
    reasoned: list[Site] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    circles: list[list[str]] = field(default_factory=list)
    dialect: list[Site] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    longest: list[tuple[str, int]] = field(default_factory=list)
    modules: int = 0

    def numbers(self) -> dict[str, int]:
        """What may only fall."""
        return {
            **{f"branches.{kind}": len(sites) for kind, sites in self.branches.items()},
            "branches.reasoned": len(self.reasoned),
            "loose_modules": len(self.loose),
            "circles": len(self.circles),
            "dialect": len(self.dialect),
            "lines": sum(self.lines.values()),
        }

    def sites(self, count: str) -> list[str]:
        """Where `count` comes from, a line each."""
        kind, _, of = count.partition(".")
        match kind:
            case "branches":
                return [str(site) for site in (self.reasoned if of == "reasoned" else self.branches[of])]
            case "loose_modules":
                return self.loose
            case "circles":
                return [" <-> ".join(circle) for circle in self.circles]
            case "dialect":
                return [str(site) for site in self.dialect]
            case _:
                return [f"{room} {lines}" for room, lines in self.lines.items()]


def measure(tree: Path) -> Counts:
    """Read every module of the package in `tree`."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted((tree / PACKAGE).rglob("*.py"))}
    parsed = {path: ast.parse(text, str(path)) for path, text in sources.items()}
    kinds = class_kinds(tree, parsed.values())
    counts = Counts(branches={count: [] for count in (*ROOMS, "by_name", "by_field", "cases")}, modules=len(parsed))
    lines: Counter[str] = Counter()
    for path, module in parsed.items():
        name, text = path.relative_to(tree).as_posix(), sources[path]
        source_lines = text.splitlines()
        for count, kind, line in branches(module, kinds):
            if in_room(path.relative_to(tree / PACKAGE), kind):
                continue
            site = Site(name, line, source_lines[line - 1].strip())
            (counts.reasoned if REASON.search(site.text) else counts.branches[count]).append(site)
        counts.dialect += [Site(name, line, word) for word, line in dialect(text)]
        lines[room(path.relative_to(tree / PACKAGE))] += len(source_lines)
    counts.lines = dict(sorted(lines.items(), key=lambda item: -item[1]))
    counts.loose = loose_modules(tree)
    counts.circles = circles(import_graph(tree, parsed))
    by_length = sorted(((len(text.splitlines()), path) for path, text in sources.items()), reverse=True)
    counts.longest = [(path.relative_to(tree).as_posix(), length) for length, path in by_length[:LONGEST]]
    return counts


# --- branches -----------------------------------------------------------------------------------------------------------


def class_kinds(tree: Path, modules: Iterable[ast.Module]) -> dict[str, str]:
    """The kind of every configuration class, of their common bases, and of names that stand for several of them."""
    modules = list(modules)
    choices: dict[str, set[str]] = defaultdict(set)
    for kind in ROOMS:
        for path in (tree / "conf" / kind).glob("*.yaml"):
            choices[path.stem].add(kind)
    classes = [node for module in modules for node in ast.walk(module) if isinstance(node, ast.ClassDef)]
    bases = {node.name: {base.id for base in node.bases if isinstance(base, ast.Name)} for node in classes}
    kinds: dict[str, str] = {}
    for node in classes:
        if node.name.endswith("Config") and (name := default_name(node)) in choices:
            kinds[node.name] = min(choices[name])
    for node in classes:  # the registered objects themselves
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Name) and decorator.id in REGISTERED:
                kinds[node.name] = REGISTERED[decorator.id]
    for name in tuple(kinds):
        for base in ancestors(name, bases):
            if base.endswith("Config"):
                kinds.setdefault(base, kinds[name])
    # Bases that plugins extend have no configuration file of their own.
    for kind in ROOMS:
        base = f"{kind.capitalize()}Config"
        if base in bases:
            kinds[base] = kind
    aliases = [node for module in modules for node in module.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    for _ in range(2):  # an alias of aliases
        for node in aliases:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and node.value is not None and (kind := kind_of(node.value, kinds)):
                kinds.setdefault(target.id, kind)
    return kinds


def default_name(node: ast.ClassDef) -> str:
    """The default of the field `name` of a dataclass."""
    for statement in node.body:
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and statement.target.id == "name"
            and isinstance(statement.value, ast.Constant)
        ):
            return str(statement.value.value)
    return ""


def ancestors(name: str, bases: dict[str, set[str]]) -> Iterator[str]:
    for base in bases.get(name, ()):
        yield base
        yield from ancestors(base, bases)


def kind_of(node: ast.expr, kinds: dict[str, str]) -> str | None:
    """The kind if `node` consists of configuration classes of one kind: `A`, `A | B`, `(A, B)`, `{A, B}`."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return kinds.get(name)
        case ast.BinOp(op=ast.BitOr() | ast.Add(), left=left, right=right):
            members = [left, right]
        case ast.Tuple(elts=members) | ast.Set(elts=members) | ast.List(elts=members):
            pass
        case ast.Starred(value=value):
            members = [value]
        case _:
            return None
    found = {kind_of(member, kinds) for member in members}
    return found.pop() if len(found) == 1 else None


def branches(module: ast.Module, kinds: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    """(count, kind, line) of every place that decides by the class, the name or the fields of a section."""
    for node in ast.walk(module):
        match node:
            case ast.Match(subject=subject, cases=cases):
                decided = {case.pattern.lineno: kind for case in cases if (kind := case_kind(case, kinds))}
                yield from ((kind, kind, node.lineno) for kind in sorted(set(decided.values())))
                yield from (("cases", kind, line) for line, kind in decided.items())
                if kind := named(subject):
                    yield "by_name", kind, node.lineno
            case ast.Call() | ast.Compare() | ast.Subscript() | ast.Dict():
                if kind := requested_class(node, kinds):
                    yield kind, kind, node.lineno
                elif kind := name_asked(node):
                    yield "by_name", kind, node.lineno
                elif kind := field_asked(node):
                    yield "by_field", kind, node.lineno


def case_kind(case: ast.match_case, kinds: dict[str, str]) -> str | None:
    classes = [node.cls for node in ast.walk(case.pattern) if isinstance(node, ast.MatchClass)]
    return next((kind for node in classes if (kind := kind_of(node, kinds))), None)


def requested_class(node: ast.expr, kinds: dict[str, str]) -> str | None:
    match node:
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, classes]):
            return kind_of(classes, kinds)
        case ast.Compare(left=left, comparators=others):
            return next((kind for side in (left, *others) if (kind := typed(side))), None)
        case ast.Subscript(slice=index) | ast.Call(func=ast.Attribute(attr="get"), args=[index, *_]):
            return typed(index)
        case ast.Dict(keys=keys) if keys:
            found = {kind_of(key, kinds) if key is not None else None for key in keys}
            return found.pop() if len(found) == 1 else None
    return None


def name_asked(node: ast.expr) -> str | None:
    match node:
        case ast.Compare(left=left, comparators=others):
            return next((kind for side in (left, *others) if (kind := named(side))), None)
        case ast.Subscript(slice=index) | ast.Call(func=ast.Attribute(attr="get"), args=[index, *_]):
            return named(index)
    return None


def field_asked(node: ast.expr) -> str | None:
    match node:
        case ast.Call(func=ast.Name(id="getattr"), args=[subject, _, _]):
            return section(subject)
        case ast.Call(func=ast.Name(id="hasattr"), args=[subject, _]):
            return section(subject)
    return None


def section(node: ast.expr) -> str | None:
    """The kind if `node` reads as a section of the configuration: `task`, `config.task`, `run.config.method`."""
    match node:
        case ast.Attribute(value=ast.Attribute(attr=owner) | ast.Name(id=owner)) if owner.endswith("engine"):
            return None  # DeepSpeed's own `optimizer`
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in ROOMS:
            return name
    return None


def named(node: ast.expr) -> str | None:
    """The kind of `config.task.name`."""
    match node:
        case ast.Attribute(value=value, attr="name"):
            return section(value)
    return None


def typed(node: ast.expr) -> str | None:
    """The kind of `type(config.task)`."""
    match node:
        case ast.Call(func=ast.Name(id="type"), args=[value]):
            return section(value)
    return None


def in_room(path: Path, kind: str) -> bool:
    """Whether a module (relative to the package) lies in a room of `kind`."""
    if path.parts[0] != ROOMS[kind] or len(path.parts) < 2:
        return False
    if len(path.parts) > 2:
        return True
    return kind in FILES_ARE_ROOMS and not path.name.startswith("_")


# --- everything else ----------------------------------------------------------------------------------------------------


def loose_modules(tree: Path) -> list[str]:
    loose = []
    for path in sorted((tree / PACKAGE).glob("*.py")):
        alias = path.stem == "worker" and len(path.read_text(encoding="utf-8").splitlines()) <= ALIAS_LINES
        if path.stem not in AT_THE_ROOT and not alias:
            loose.append(path.stem)
    return loose


def import_graph(tree: Path, parsed: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """Which module imports which, also inside functions, but not for annotations alone."""
    names = {path: ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__") for path in parsed}
    modules = set(names.values())
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for path, module in parsed.items():
        here = names[path]
        for node in run_time_nodes(module):
            match node:
                case ast.Import(names=aliases):
                    targets = [alias.name for alias in aliases]
                case ast.ImportFrom(module=source, names=aliases, level=level):
                    if level:
                        package = here.split(".") if path.name == "__init__.py" else here.split(".")[:-1]
                        source = ".".join([*package[: len(package) - level + 1], *([source] if source else [])])
                    targets = [
                        whole if (whole := f"{source}.{alias.name}") in modules else str(source) for alias in aliases
                    ]
                case _:
                    continue
            graph[here] |= {target for target in targets if target in modules and target != here}
    return graph


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk` without the bodies of `if TYPE_CHECKING:`."""
    left = [node]
    while left:
        for child in ast.iter_child_nodes(left.pop()):
            if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
                yield child
                left.append(child)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected groups of at least two modules (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

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
                found.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for name in sorted(graph):
        if name not in index:
            visit(name)
    return sorted(found)


def dialect(text: str) -> Iterator[tuple[str, int]]:
    """(identifier, line) of every use of an identifier with a part in `DIALECT`."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and in_dialect(token.string):
            yield token.string, token.start[0]


@functools.cache
def in_dialect(identifier: str) -> bool:
    return any(map(DIALECT.fullmatch, re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)))


# --- the command --------------------------------------------------------------------------------------------------------


def rises(before: dict[str, int], now: dict[str, int]) -> list[str]:
    """A line for each count above the committed one."""
    return [f"{name}: {before.get(name, 0)} -> {value}" for name, value in now.items() if value > before.get(name, 0)]


def table(title: str, before: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> str:
    """The sections of a tree beside those of `before`; rows of either."""
    rows = [("", title, "now")]
    for heading, counts in now.items():
        earlier = before.get(heading, {})
        rows += [(heading, "", "")] if heading else []
        for name in dict.fromkeys([*counts, *earlier]):
            values = (str(side.get(name, "")) for side in (earlier, counts))
            rows.append(("  " * bool(heading) + name, *values))
        rows.append(("", "", ""))
    widest = max(len(row[0]) for row in rows)
    return "\n".join(f"{a:<{widest}}  {b:>9}  {c:>7}".rstrip() for a, b, c in rows).rstrip()


def sections(counts: Counts, run: dict[str, Loaded]) -> dict[str, dict[str, int]]:
    """What the table prints of a tree, by heading."""
    found = {"": counts.numbers()}
    for role, process in run.items():
        if (unused := process.of_unused_rooms()) is not None:
            found[""][f"files of unused rooms, {role}"] = len(unused)
        by_room = dict(process.by_room().most_common())
        found[f"modules loaded by the {role}"] = {"all": process.modules, PACKAGE: len(process.files)} | by_room
    return found | {"lines by room": counts.lines, "longest files": dict(counts.longest)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tree", nargs="?", type=Path, default=HOME)
    parser.add_argument(
        "--before", metavar="TREE", type=Path, help="print the counts of this tree in place of the committed ones"
    )
    parser.add_argument("--loaded", action="store_true", help="train one step, and count the modules that it imports")
    parser.add_argument("--json", action="store_true", help="print the counts, lines by room and longest files as JSON")
    parser.add_argument("--sites", metavar="COUNT", help="list where a count comes from")
    parser.add_argument("--update", action="store_true", help=f"write the counts that fell to {RECORD}")
    parser.add_argument(
        "--raise", dest="named", action="append", default=[], metavar="COUNT", help="write this one anyway"
    )
    chosen = parser.parse_args(arguments)
    counts = measure(chosen.tree.resolve())
    numbers = counts.numbers()
    if chosen.sites:
        print(*counts.sites(chosen.sites), sep="\n")
        return 0
    if chosen.json:
        print(json.dumps(numbers | {"by_room": counts.lines, "longest": dict(counts.longest)}, indent=2))
        return 0
    record = HOME / RECORD
    before = json.loads(record.read_text(encoding="utf-8"))
    trees = {"committed": {"": before}} if chosen.before is None else {}
    for title, tree in {"before": chosen.before, "now": chosen.tree}.items():
        if tree is not None:
            run = loaded(tree.resolve()) if chosen.loaded else {}
            trees[title] = sections(counts if title == "now" else measure(tree.resolve()), run)
    (title, earlier), (_, now) = trees.items()
    print(table(title, earlier, now))
    if chosen.tree.resolve() != HOME:
        return 0
    if chosen.update:
        before = {
            name: now if name in chosen.named else min(now, before.get(name, now)) if name != "lines" else before[name]
            for name, now in numbers.items()
        }
        record.write_text(json.dumps(before, indent=2) + "\n", encoding="utf-8")
    if risen := rises(before, numbers):
        print("\nmay fall only:", *risen, sep="\n  ")
    return 1 if risen else 0


if __name__ == "__main__":
    sys.exit(main())

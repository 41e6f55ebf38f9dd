"""Prepares Hydra to compose dstune's groups: its typed schema (the mutable twin of `schema.py`) and the folders of YAML files."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dstune
from dstune.config.convert import is_optional
from dstune.config.fields import BY_METHOD, MemberName
from dstune.config.names import ROOT_KEYS, classes_of, entry_class, is_section, sections, type_hints
from dstune.config.schema import CHOICES
from dstune.core import plugins
from dstune.core.errors import Problem, UserError
from dstune.core.registry import on_change

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

ROOT_CONFIG = "train"


@cache
def mutable_twin(cls: type) -> type:
    """Return a copy of the dataclass `cls` and its nested classes without `frozen`, since Hydra merges values into instances.

    The default of a nested section is its class, which OmegaConf instantiates.
    """
    twins: list[tuple[str, Any, Any]] = []
    hints = type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if is_section(hint):
            twin = mutable_twin(hint)
            twins.append((field.name, twin, twin))
        elif BY_METHOD in field.metadata:
            twins.append((field.name, Any, dataclasses.field(default=None)))  # `by_method.fill` replaces it
        elif entry_class(hint):
            # Untyped, because OmegaConf would stop at the first wrong key; `from_dict` checks all of them and names the nearest.
            twins.append((field.name, dict[str, Any], dataclasses.field(default_factory=dict)))
        elif (isinstance(hint, types.UnionType) and not is_optional(hint)) or _is_member_name(hint):
            # Untyped, because OmegaConf has neither unions of numbers and words nor names that are looked up in a registry.
            twins.append((field.name, Any, dataclasses.field(default=field.default)))
        elif field.default_factory is not dataclasses.MISSING:
            twins.append((field.name, hint, dataclasses.field(default_factory=field.default_factory)))
        else:
            twins.append((field.name, hint, dataclasses.field(default=field.default)))
    # OmegaConf reads only the fields. Generating the methods of a dataclass takes 0.3 ms, for each of 40 classes.
    return dataclasses.make_dataclass(cls.__name__, twins, init=False, repr=False, eq=False)


def _is_member_name(hint: Any) -> bool:
    kinds = typing.get_args(hint) or (hint,)
    return any(isinstance(kind, type) and issubclass(kind, MemberName) for kind in kinds)


class _Schemas(dict[str, Any]):
    """A group in Hydra's store with the choices of a section, whose nodes are created when they are read.

    A run reads 7 of 44 nodes; creating one takes 3 ms, and importing the rooms of all choices 0.1 s.
    """

    def __init__(self, section: str) -> None:
        super().__init__()
        self.section = section

    def keys(self) -> Any:
        return [f"{choice}.yaml" for choice in CHOICES[self.section]]

    def __contains__(self, name: object) -> bool:
        return CHOICES.find(self.section, str(name).removesuffix(".yaml")) is not None

    def __getitem__(self, name: str) -> Any:
        cls = CHOICES.find(self.section, name.removesuffix(".yaml"))
        if cls is None:
            raise KeyError(name)
        return _node(self.section, name, cls)

    def __deepcopy__(self, _: Any) -> _Schemas:
        return self  # Hydra copies its store for each composition, and each node when it is read


@cache
def _node(section: str, name: str, cls: type) -> Any:
    from hydra.core.config_store import ConfigNode
    from omegaconf import OmegaConf

    node = OmegaConf.structured(mutable_twin(cls))
    return ConfigNode(name=name, node=node, group=f"schema/{section}", package=None, provider="dstune")


_plugin_choices: list[tuple[str, str]] = []
"""(group, name) of the stored choices that plugins add."""


@cache
def register_schema() -> None:
    """Store the schema with Hydra: `run_schema` types the sections without choices, `schema/GROUP/CHOICE` those with choices."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for group, name in _plugin_choices:
        store.repo[group].pop(f"{name}.yaml", None)  # its plugin may no longer be active
    _plugin_choices.clear()
    plugins.load_installed()
    store.repo["schema"] = {section: _Schemas(section) for section in CHOICES}
    root: list[tuple[str, Any, Any]] = []
    for section in sections():
        if section in CHOICES:
            # `Any`, because the schema of the choice replaces this value, and OmegaConf has no union of classes.
            root.append((section, Any, dataclasses.field(default_factory=dict)))
            for choice, member in CHOICES.of_plugins(section).items():
                # A plugin's choice has no file like conf/GROUP/NAME.yaml. This node takes its place: the defaults of the class,
                # and the settings of other sections that the choice implies.
                settings = getattr(member, "choice_settings", {})
                node = {"defaults": [f"/schema/{section}/{choice}@{section}", "_self_"], **settings}
                store.store(choice, node, group=section, package="_global_", provider=member.Config.__module__)
                _plugin_choices.append((section, choice))
        else:
            twin = mutable_twin(classes_of(section)[""])
            root.append((section, twin, twin))
    for key, hint in ROOT_KEYS.items():
        root.append((key, hint, dataclasses.field(default_factory=list)))
    run_schema = dataclasses.make_dataclass("RunConfig", root, init=False, repr=False, eq=False)
    store.store(name="run_schema", node=run_schema, provider="dstune")


on_change(register_schema.cache_clear)


def config_folder() -> Path:
    """Return the folder `conf/` beside the package in a checkout, `dstune/conf` where it is installed.

    The checkout comes first: if another version is installed, `dstune.conf` would be that version's.

    Raises:
        UserError: neither folder exists.
    """
    package = Path(dstune.__file__).resolve().parent
    folder = package.parent / "conf"
    if (package.parent / "pyproject.toml").is_file() and (folder / f"{ROOT_CONFIG}.yaml").is_file():
        return folder
    spec = importlib.util.find_spec("dstune.conf")
    if spec is None or spec.origin is None:
        raise UserError(
            Problem(str(folder), "dstune's configuration files are missing", "install dstune again (pip install .)")
        )
    return Path(spec.origin).parent


def config_folders() -> list[Path]:
    """Return the folders with dstune's own choices: `conf/`, then `dstune/WING/conf/` of each wing that is installed."""
    package = Path(dstune.__file__).resolve().parent
    return [config_folder(), *sorted(folder for folder in package.glob("*/conf") if folder.is_dir())]


@contextmanager
def session(config_dirs: Sequence[str | Path] = ()) -> Iterator[Hydra]:
    """Prepare Hydra to compose. `config_dirs` are searched after dstune's own groups, so they add choices but replace none.

    Raises:
        UserError: one of `config_dirs` is no folder.
    """
    missing = [folder for folder in config_dirs if not Path(folder).is_dir()]
    if missing:
        raise UserError(
            Problem("--config-dir", "there is no such folder", "give a folder with groups in it", str(folder))
            for folder in missing
        )
    from hydra import initialize_config_dir
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    register_schema()
    main, *wings = config_folders()
    with initialize_config_dir(str(main), job_name="dstune", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None, "initialize_config_dir sets the global instance"
        search_path = hydra.config_loader.get_search_path()
        for provider, extra in [
            *(("dstune", folder) for folder in wings),
            *(("command-line", path) for path in config_dirs),
        ]:
            # As with Hydra's --config-dir: before the schema, after dstune's own files.
            search_path.prepend(provider, f"file://{Path(extra).resolve()}", SearchPathQuery(provider="schema"))
        if wings or config_dirs:
            hydra.config_loader.repository.initialize_sources(search_path)
        yield hydra


def hidden_files(composed: DictConfig) -> Iterator[Problem]:
    """Yield a problem for each file in the user's folders that has no effect because dstune has a file of the same name."""
    runtime, packaged_folders = composed.hydra.runtime, config_folders()
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    chosen = [("", ROOT_CONFIG)]
    for group, choices in runtime.choices.items():
        chosen += [(group, name) for name in ([choices] if isinstance(choices, str | None) else choices) if name]
    for group, name in chosen:
        file = Path(group, f"{name}.yaml")
        packaged = next((folder / file for folder in packaged_folders if (folder / file).is_file()), None)
        if packaged is None:
            continue
        for path in (folder / file for folder in folders):
            if not path.is_file() or _settings(path) == _settings(packaged):
                continue  # an unedited copy would change nothing anyway
            where = f"{group}={name}" if group else packaged.name
            fix = f"rename it: as {group}/my_{name}.yaml it is chosen by {group}=my_{name}"
            if not group:
                fix = f"put its keys into {path.parent}/experiment/NAME.yaml, which experiment=NAME chooses"
            yield Problem(str(path), f"this file would have no effect: {where} chooses dstune's own file", fix)


def _settings(file: Path) -> list[bytes]:
    return [line for line in file.read_bytes().splitlines() if line.strip() and not line.lstrip().startswith(b"#")]


@contextmanager
def program_name() -> Iterator[None]:
    """Let Hydra print `dstune` as the program's name, which it takes from argv (`__main__.py` with `python -m dstune`)."""
    argv = sys.argv
    sys.argv = ["dstune"]
    try:
        yield
    finally:
        sys.argv = argv


def group_options(hydra: Hydra, searched: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the choices of every group except Hydra's own. The group `schema` contains only groups, so it has none.

    searched: overrides of `hydra.searchpath`.
    """
    from hydra.core.object_type import ObjectType

    def options(group: str, kind: ObjectType) -> list[str]:
        if searched:
            return hydra.config_loader.get_group_options(group, kind, ROOT_CONFIG, list(searched))
        # The loader would copy its repository for every call: 0.3 s for all groups.
        return hydra.config_loader.repository.get_group_options(group, kind)

    groups = [group for group in options("", ObjectType.GROUP) if group != "hydra"]
    return {
        group: choices
        for group in groups
        if (choices := [name for name in options(group, ObjectType.CONFIG) if name != "__init__"])
    }

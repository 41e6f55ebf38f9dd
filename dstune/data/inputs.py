"""List what the rows of each part are read from: one source, or several by name. Light: the launching process uses it too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dstune.config.data_schema import AUTOMATIC, SourceConfig
from dstune.config.forgetting import general_rows
from dstune.config.multi_task import task_of_source
from dstune.config.schema import RunConfig

PARTS = ("train", "validation", "test", "guard", "ood")


def of_source(config: RunConfig, source: SourceConfig) -> RunConfig:
    """Return the configuration under which `source` alone would be the training data."""
    data = replace(
        config.data,
        train=source.path,
        mixture={},
        format=config.data.format if source.format == AUTOMATIC else source.format,
        columns={**config.data.columns, **source.columns},
        subset=source.subset,
        revision=source.revision,
    )
    return replace(config, data=data, task=task_of_source(config, source))


def of_training(config: RunConfig) -> dict[str, tuple[str, RunConfig]]:
    """Return the training sources by name (empty without a mixture): the key that names each, and the configuration in which
    `data.train` is that source."""
    if not config.data.mixture:
        return {"": ("data.train", config)}
    return {
        name: (f"data.mixture.{name}.path", of_source(config, source)) for name, source in config.data.mixture.items()
    }


def row_inputs(config: RunConfig) -> Iterator[tuple[str, str, RunConfig]]:
    """Yield (key, part, configuration in which `data.PART` is the source) for everything that rows are read from."""
    for key, source_config in of_training(config).values():
        yield key, "train", source_config
    for part in PARTS[1:]:
        if getattr(config.data, part) is not None:
            yield f"data.{part}", part, config
    if config.forgetting.ewc and config.forgetting.general is not None:
        yield "forgetting.general", "train", general_rows(config)

"""Rules for the settings of the tools about images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dstune.importing.result import DIFFERENT, MEANINGLESS, NOT_SUPPORTED, Import
from dstune.importing.rules import Rule, missing, own_way

SIZES = missing("images have the sizes that the files of the model's processor give them: change size there, in a copy")
VIDEO = missing("no task reads video or audio")
PROJECTOR = "model.train_vision trains tower and projector together, or neither"
SEEN = own_way("a model sees the images of rows that have some")


def parts_that_learn(tower: str, projector: str, language: str) -> dict[str, Rule]:
    """Return the rules of switches that freeze a part of a model that sees; tower and projector are frozen where a file is silent.

    tower, projector, language: the tool's names of the switches.
    """

    def trains(imported: Import, key: str) -> bool:
        return not imported.get(key, True)

    def rule_of(other: str) -> Callable[[Import, Any], None]:
        def rule(imported: Import, value: Any) -> None:
            tower_learns = trains(imported, tower)
            imported.put("model.train_vision", tower_learns)
            if tower_learns != trains(imported, projector) and (not value or other not in imported.raw):
                imported.drop(PROJECTOR, DIFFERENT if tower_learns else NOT_SUPPORTED)

        return rule

    frozen = missing("the language model is always trained")
    return {tower: rule_of(projector), projector: rule_of(tower), language: frozen}


def vision_rate(tower: str) -> Rule:
    """Return the rule of a learning rate of tower or projector. tower: the name of the switch that freezes the former."""

    def rule(imported: Import, value: Any) -> None:
        rate = float(value)
        if imported.get(tower, True):
            imported.drop(f"{tower} is on", MEANINGLESS)
        elif imported.values.get("optimizer.vision_lr", rate) != rate:
            imported.drop("optimizer.vision_lr is one rate for tower and projector: the other key's", DIFFERENT)
        else:
            imported.put("optimizer.vision_lr", rate)

    return rule

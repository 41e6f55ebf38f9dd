"""method=features: the frozen body reads every row once; a classifier is trained on what it gave, from the cache."""

from __future__ import annotations

from dstune.config.method_schema import FeaturesConfig
from dstune.protocols import Method, method


@method
class Features(Method):
    Config = FeaturesConfig
    config: FeaturesConfig

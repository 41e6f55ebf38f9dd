"""Detect the language of a row offline with py3langid (139 languages, a model of 5 MB inside the package)."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.data.clean.extras import require

KEY = "data.clean.languages"

SURE = 0.5
"""A row is left out only if another language is at least this probable: a few words may belong to many languages."""

LOOKED_AT = 1000
"""Number of characters of a row that are examined: more do not change the answer."""


@cache
def _identifier() -> Any:
    module = require("py3langid.langid", KEY)
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


def check_languages(languages: list[str]) -> None:
    """Check the language codes. Raises UserError for those that the detector does not know."""
    codes = [label for label in _identifier().labels if label != "zxx"]
    problems = []
    for code in languages:
        if code not in codes:
            nearest = difflib.get_close_matches(code, codes, 1, 0.3)
            fix = f"did you mean {nearest[0]}? " if nearest else ""
            fix += "give ISO 639 codes such as en, de or zh"
            problems.append(Problem(where=KEY, value=code, reason="no such language", fix=fix))
    if problems:
        raise UserError(problems)


def language(text: str) -> tuple[str, float]:
    """Return the most probable language of `text` (an ISO 639 code; `zxx`: no language) and its probability."""
    return _identifier().classify(text[:LOOKED_AT])

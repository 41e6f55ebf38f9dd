"""Freeze the date that a chat template prints."""

from __future__ import annotations

import datetime

_DATE_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMprRSTuUVwWxXyYzZ"


def freeze_date(template: str, date: str | None) -> str:
    """Return `template` with `strftime_now` fixed to `date` (`YYYY-MM-DD`, at midnight; None: today).

    A template that prints the current date would give different tokens (and another cache entry) each day. The replacement is a
    macro, since transformers passes no Python function to a template. A template with a built-in date that does not ask for the
    current one stays as it is: inference servers render it the same way.
    """
    if "strftime_now" not in template:
        return template
    day = datetime.date.fromisoformat(date) if date else datetime.date.today()
    moment = datetime.datetime.combine(day, datetime.time())
    replaced = "".join(
        f" | replace('%-{letter}', '{moment.strftime(f'%{letter}').lstrip('0') or '0'}')"
        f" | replace('%{letter}', '{moment.strftime(f'%{letter}')}')"
        for letter in _DATE_DIRECTIVES
    )
    # trim_blocks removes exactly the line break after the block, so the first characters of the template stay.
    body = f"{{{{ format{replaced} | replace('%%', '%') }}}}"
    return f"{{%- macro strftime_now(format) -%}}{body}{{%- endmacro %}}\n{template}"

"""The date that a chat template prints, frozen."""

from __future__ import annotations

import datetime

_DATE_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMprRSTuUVwWxXyYzZ"


def freeze_date(template: str, date: str | None) -> str:
    """Return `template` with `strftime_now` replaced by one that always tells `date` (`YYYY-MM-DD`, at midnight; None: today).

    A template that prints the current date would give other tokens (and another cache) each day. The replacement is a
    macro, since transformers lets no Python function through to a template. A template with a date of its own
    that does not ask for the current one stays as it is, as inference servers render it so too.
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
    # trim_blocks removes exactly the line break after the block, so the template's own first characters stay.
    body = f"{{{{ format{replaced} | replace('%%', '%') }}}}"
    return f"{{%- macro strftime_now(format) -%}}{body}{{%- endmacro %}}\n{template}"

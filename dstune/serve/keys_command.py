"""The verb `dstune serve-keys` creates, lists and revokes clients' keys, whether or not the server runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.serve import extra
from dstune.serve.state import STATE, open_database


def main(argv: list[str]) -> int:
    """Run `dstune serve-keys` and return the exit code. Raises UserError."""
    arguments = _parser().parse_args(argv)
    extra.require()
    from dstune.serve.store.keys import Keys, Limit

    if arguments.action != "list" and not arguments.name:
        raise UserError(Problem("NAME", "this is missing", f"dstune serve-keys {arguments.action} NAME"))
    database = open_database(arguments.state, arguments.store, create=arguments.action == "add")
    keys = Keys(database)
    if arguments.action == "add":
        limit = Limit(arguments.requests_per_minute, arguments.tokens_per_day, arguments.concurrent)
        models = _names(arguments.models) if arguments.models is not None else None
        project = keys.project(arguments.organization, arguments.project)
        if arguments.admin and arguments.role not in (None, "owner"):
            raise UserError(Problem("--role", "an admin is an owner", "leave out --role or --admin", arguments.role))
        role = "owner" if arguments.admin else (arguments.role or "member").replace("-", "_")
        key = keys.add(arguments.name, admin=arguments.admin, models=models, limit=limit, project=project, role=role)
        print(json.dumps({"name": arguments.name, "key": key}) if arguments.json else key)
        print("dstune: keep it now: its hash alone is stored", file=sys.stderr)
    elif arguments.action == "revoke":
        keys.revoke(arguments.name)
        print(json.dumps({"revoked": arguments.name}) if arguments.json else f"{arguments.name} is revoked")
    else:
        _list(keys.all(), keys.organizations(), as_json=arguments.json)
    database.close()
    return EXIT_DONE


def _list(rows: list, organizations: Mapping[str, str], *, as_json: bool) -> None:
    """Print keys. organizations: organization ids by project id."""
    for row in rows:
        values = {
            "name": row.name,
            "id": row.id,
            "admin": row.admin,
            "organization": organizations.get(row.project),
            "project": row.project,
            "role": row.role,
            "models": row.models,
            "requests_per_minute": row.requests_per_minute,
            "tokens_per_day": row.tokens_per_day,
            "concurrent": row.concurrent,
            "created": row.created.isoformat(timespec="seconds"),
            "revoked": row.revoked is not None,
        }
        if as_json:
            print(json.dumps(values))
        else:
            columns = [
                f"{name}={value}" for name, value in values.items() if name != "name" and value not in (None, False)
            ]
            print(f"{row.name:<24} {' '.join(columns)}")


def _parser() -> VerbParser:
    parser = VerbParser(prog="dstune serve-keys", description="Keys of clients of `dstune serve`.")
    parser.add_argument(
        "action", choices=("add", "list", "revoke"), metavar="add|list|revoke", help="make one, show all, end one"
    )
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("--admin", action="store_true", help="may see metrics and change models too")
    parser.add_argument(
        "--role", choices=("owner", "member", "read-only"), help="(default member; an admin is an owner)"
    )
    parser.add_argument("--project", default="default", metavar="NAME", help="whose files and jobs it shares")
    parser.add_argument("--organization", default="default", metavar="NAME", help="of the project")
    parser.add_argument(
        "--models", metavar="NAME[,NAME...]", help="models that it may use, also ones that come later (default: all)"
    )
    parser.add_argument("--requests-per-minute", type=_positive, metavar="N")
    parser.add_argument("--tokens-per-day", type=_positive, metavar="N")
    parser.add_argument("--concurrent", type=_positive, metavar="N", help="requests at once")
    parser.add_argument("--state", type=Path, metavar="DIR", help=f"of the server (default {STATE})")
    parser.add_argument("--store", metavar="URL", help="of the database, where it is not the server's SQLite file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _names(text: str) -> list[str]:
    """Return the model names of a comma-separated list. Raises UserError if it is empty: such a key could use nothing."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(Problem("--models", "names no model", "--models NAME[,NAME...]", text))
    return names


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError("must be a whole number of at least 1")
    return int(text)

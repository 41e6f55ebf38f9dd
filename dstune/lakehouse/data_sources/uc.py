"""`uc://CATALOG.SCHEMA.TABLE`: a Delta table in Unity Catalog. The catalog's REST API returns the table's place and credentials
that are valid for some minutes. Only the reader gets them: they are neither put into the environment nor written to a file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.core.network import LOOPBACK, ask_no_metadata_service
from dstune.lakehouse.address import Address
from dstune.lakehouse.source import Table
from dstune.lakehouse.tables import LIBRARY
from dstune.protocols import data_source
from dstune.protocols.launcher import PASS, SKIP, Check

NAME = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+")
SECONDS = 30.0
HOST, TOKEN, CLIENT, SECRET = "DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CLIENT_ID", "DATABRICKS_CLIENT_SECRET"
CATALOG = "api/2.1/unity-catalog"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the token is for one host only."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_NoRedirects)


@data_source
class UnityCatalog(Table):
    name = "uc"

    @classmethod
    def probe(cls) -> Iterator[Check]:
        if importlib.util.find_spec("deltalake") is None:
            yield Check("delta", SKIP, "the package deltalake is not installed", LIBRARY)
            return
        detail = f"deltalake {importlib.metadata.version('deltalake')}; uc:// never asked of Databricks itself, see docs/delta.md"
        yield Check("delta", PASS, detail)

    def locate(self, address: Address, key: str, *, to_write: bool = False) -> tuple[Address, str, dict[str, str]]:
        return address, *locate(address, key, "READ_WRITE" if to_write else "READ")


def locate(address: Address, key: str, operation: str) -> tuple[str, dict[str, str]]:
    """Return the table's place and the reader's options for opening it. Raises UserError."""
    spec = str(replace(address, table_id=""))
    if NAME.fullmatch(address.location) is None:
        raise UserError(Problem(key, "a table has three names", "uc://CATALOG.SCHEMA.TABLE", spec))
    host = os.environ.get(HOST, "").rstrip("/")
    if not host:
        fix = f"export {HOST}=https://... and {TOKEN}, or {CLIENT} and {SECRET}"
        raise UserError(Problem(key, f"{HOST} is not set: which catalog is meant?", fix, spec))
    host = host if "://" in host else f"https://{host}"
    split = urllib.parse.urlsplit(host)
    if split.scheme != "https" and split.hostname not in LOOPBACK:
        reason = f"{HOST} is no address of HTTPS: the token would be readable on its way"
        raise UserError(Problem(key, reason, f"export {HOST}=https://{split.netloc or 'HOST'}", spec))
    ask_no_metadata_service()
    token = _token(host, key, spec)
    table = _ask(f"{host}/{CATALOG}/tables/{urllib.parse.quote(address.location)}", token, key, spec)
    kind = str(table.get("data_source_format", "")).upper()
    if kind != "DELTA":
        fix = "give a Delta table: views and other formats have no versions"
        raise UserError(
            Problem(key, f"is no Delta table but {kind or table.get('table_type', 'something else')}", fix, spec)
        )
    place = str(table.get("storage_location", ""))
    if place.startswith("file:"):
        return urllib.parse.unquote(urllib.parse.urlsplit(place).path), {}
    body = {"table_id": table.get("table_id"), "operation": operation}
    credentials = _ask(f"{host}/{CATALOG}/temporary-table-credentials", token, key, spec, body)
    return place, _options(credentials, place, key, spec)


def _token(host: str, key: str, spec: str) -> str:
    """Return the user's token, or one for a service principal (OAuth with client id and secret). Raises UserError."""
    if token := os.environ.get(TOKEN):
        return token
    client, secret = os.environ.get(CLIENT), os.environ.get(SECRET)
    if not client or not secret:
        fix = f"export {TOKEN}, or {CLIENT} and {SECRET}"
        raise UserError(Problem(key, f"there are no credentials for {host}", fix, spec))
    form = {"grant_type": "client_credentials", "scope": "all-apis", "client_id": client, "client_secret": secret}
    answer = _ask(f"{host}/oidc/v1/token", "", key, spec, form, as_form=True)
    return str(answer.get("access_token", ""))


def _ask(
    url: str, token: str, key: str, spec: str, body: Mapping[str, Any] | None = None, *, as_form: bool = False
) -> dict[str, Any]:
    data = None if body is None else (urllib.parse.urlencode(body) if as_form else json.dumps(body)).encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded" if as_form else "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        with OPENER.open(urllib.request.Request(url, data, headers), timeout=SECONDS) as answer:
            value = json.load(answer)
    except urllib.error.HTTPError as error:
        raise UserError(Problem(key, _refusal(error), _FIXES.get(error.code, "look at the catalog"), spec)) from None
    except (OSError, ValueError) as error:
        reason = f"the catalog does not answer: {getattr(error, 'reason', error)}"
        raise UserError(Problem(key, reason, f"look at {HOST} and the network", spec)) from None
    return value if isinstance(value, dict) else {}


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        answer = json.loads(error.read(4096))
        message = f"{answer.get('error_code', '')} {answer.get('message', '')}".strip()
    except (ValueError, OSError, AttributeError):
        message = ""
    return f"the catalog refuses it ({error.code}): {message or error.reason}"


_FIXES = {
    **dict.fromkeys((301, 302, 303, 307, 308), f"{HOST} itself has to answer: a token is sent nowhere else"),
    401: f"look at {TOKEN}",
    403: "ask for EXTERNAL USE SCHEMA on the schema and SELECT on the table; external access must be on for the metastore",
    404: "look at the three names: SHOW TABLES IN CATALOG.SCHEMA",
}


def _options(credentials: Mapping[str, Any], place: str, key: str, spec: str) -> dict[str, str]:
    """Convert the catalog's temporary credentials to the reader's options. Raises UserError."""
    try:
        if options := _known_options(credentials):
            return options
    except (KeyError, TypeError):
        pass
    if credentials.get("gcp_oauth_token"):  # given such a token, the reader would query the machine's metadata service
        reason = f"{place} is at Google, and the library takes no token of the catalog for it"
        fix = f"delta://{place} with GOOGLE_APPLICATION_CREDENTIALS"
        raise UserError(Problem(key, reason, fix, spec))
    reason = f"the catalog gives no credentials that are known here for {place.partition('://')[0]}://"
    raise UserError(Problem(key, reason, "ask for external access to the table", spec))


def _known_options(credentials: Mapping[str, Any]) -> dict[str, str]:
    if keys := credentials.get("aws_temp_credentials"):
        options = {
            "aws_access_key_id": keys["access_key_id"],
            "aws_secret_access_key": keys["secret_access_key"],
            "aws_session_token": keys["session_token"],
        }
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return options | ({"aws_region": region} if region else {})
    if keys := credentials.get("azure_user_delegation_sas"):
        return {"azure_storage_sas_token": keys["sas_token"]}
    return {}

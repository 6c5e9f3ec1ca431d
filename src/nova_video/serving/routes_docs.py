"""The page `/docs`: all routes and their words, from the server's own OpenAPI. It loads nothing from elsewhere."""

import base64
import hashlib
import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

STYLE = """
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
details { border-top: 1px solid #8886; padding: .5rem 0; }
summary { cursor: pointer; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .5rem 0; width: 100%; }
td, th { border-bottom: 1px solid #8884; padding: .25rem .5rem; text-align: left; vertical-align: top; }
"""
POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/docs")
def get_reference(request: Request) -> HTMLResponse:
    return HTMLResponse(reference_page(request.app.openapi()), headers={"content-security-policy": POLICY})


def reference_page(openapi: dict[str, Any]) -> str:
    """All routes of an OpenAPI description as HTML."""
    routes = "".join(
        _route(path, method, operation)
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    )
    title = escape(openapi["info"]["title"])
    about = "".join(f"<p>{escape(part)}</p>" for part in openapi["info"]["description"].split("\n\n"))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
        f'<h1>{title}</h1>{about}<p>For programs: <a href="openapi.json">openapi.json</a></p>{routes}</html>'
    )


def _route(path: str, method: str, operation: dict[str, Any]) -> str:
    """One route, folded: its words, an example and its answers."""
    head = f"<code>{method.upper()} {escape(path)}</code> {escape(operation.get('summary', ''))}"
    query = [(each["name"], each["schema"] | each, each.get("required")) for each in operation.get("parameters", ())]
    parts = [_table(query)]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        parts.append(f"<p>Body: <code>{escape(kind)}</code></p>")
        for example in schema.get("examples", ()):
            parts.append(f"<p>Such as <code>{escape(json.dumps(example))}</code></p>")
    words = _words(operation)
    answers = [
        f"<li><code>{status}</code> {escape(told.get('description', ''))}</li>"
        for status, told in operation["responses"].items()
    ]
    return f"<details><summary>{head}</summary>{''.join(parts)}{_table(words)}<ul>{''.join(answers)}</ul></details>"


def _words(operation: dict[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """The words of a body, which has the same ones in each form."""
    contents: dict[str, Any] = operation.get("requestBody", {}).get("content", {})
    schema: dict[str, Any] = next((content["schema"] for content in contents.values()), {})
    required = schema.get("required", ())
    return [(name, each, name in required) for name, each in schema.get("properties", {}).items()]


def _table(rows: list[tuple[str, dict[str, Any], Any]]) -> str:
    if not rows:
        return ""
    lines = "".join(
        f"<tr><td><code>{escape(name)}</code>{', needed' if needed else ''}</td>"
        f"<td>{escape(' or '.join(_kinds(schema)))}</td><td>{escape(schema.get('description', ''))}</td></tr>"
        for name, schema, needed in rows
    )
    return f"<table><tr><th>word</th><th>value</th><th>meaning</th></tr>{lines}</table>"


def _kinds(schema: dict[str, Any]) -> Iterator[str]:
    """The types of a value in words, with their bounds."""
    for each in schema.get("anyOf", [schema]):
        if "enum" in each:
            yield ", ".join(map(str, each["enum"]))
        elif "contentMediaType" in each:
            yield "a file"
        elif each.get("type") not in (None, "null"):
            low = each.get("minimum", each.get("exclusiveMinimum"))
            bounds = f" above {low:g}" if "exclusiveMinimum" in each else "" if low is None else f" from {low:g}"
            yield each["type"] + bounds + (f" to {each['maximum']:,}" if "maximum" in each else "")

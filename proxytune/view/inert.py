"""One HTML file that loads nothing, and runs nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
from html import escape

__all__ = ["inert"]


def inert(title: str, body: str, sheet: str, script: str = "") -> str:
    """A page with one style sheet and at most one script, under a content security policy that allows those alone.

    `title` is escaped here; whatever a text says must have been escaped in `body`.
    """
    scripts = f"script-src '{_hash(script)}'; " if script else ""
    policy = f"default-src 'none'; {scripts}style-src '{_hash(sheet)}'; base-uri 'none'; form-action 'none'"
    code = f"\n<script>{script}</script>" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>{sheet}</style>
</head>
<body>
{body}{code}
</body>
</html>
"""


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

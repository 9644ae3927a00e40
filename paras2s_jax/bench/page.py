"""Pages of one HTML file: their own style and script, nothing from elsewhere.

Everything a model wrote or heard is untrusted text. Templates escape it (autoescape), scripts put
it into text nodes only, and a content security policy lets the page run no script but its own.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jinja2
import markupsafe

from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.data.records import write_text

# Sound comes from the page itself, or from files beside it.
_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; "
    "media-src data: 'self' file:; base-uri 'none'; form-action 'none'"
)
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("paras2s_jax.bench"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# Blocks of data keep their order and stay small.
_ENVIRONMENT.policies["json.dumps_kwargs"] = {
    "allow_nan": False,
    "ensure_ascii": False,
    "separators": (",", ":"),
}


def render(
    template: str, *, styles: Sequence[str], scripts: Sequence[str], **values: object
) -> str:
    """HTML of a page.

    Args:
        template: extends base.html.
        styles, scripts: files of the templates folder, in order; they become one style and one
            script element.
        values: for the template; text is escaped where it is used.
    """
    style, script = _joined(styles), _joined(scripts)
    return _ENVIRONMENT.get_template(template).render(
        style=markupsafe.Markup(style),
        script=markupsafe.Markup(script),
        policy=_POLICY.format(style=_csp_hash(style), script=_csp_hash(script)),
        **values,
    )


def fragment(template: str, **values: object) -> str:
    """HTML to put into another page, without style or script; text is escaped where it is used."""
    return _ENVIRONMENT.get_template(template).render(**values)


def write(path: Path, text: str) -> Path:
    """Writes a page atomically. Returns: its path."""
    path = Path(path)
    if path.is_dir():
        raise BenchError(f"{path} is a folder; name the page itself, for instance index.html.")
    return write_text(path, text)


def _joined(names: Sequence[str]) -> str:
    return "\n".join(_ENVIRONMENT.loader.get_source(_ENVIRONMENT, name)[0] for name in names)


def _csp_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"

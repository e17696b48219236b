"""Pages that need nothing but themselves: a template, with the style and script that all share."""

from importlib.resources import files
from string import Template


def filled_page(name: str, **parts: str) -> str:
    """The template `name` with its parts, which are HTML, or JSON that may stand in a script element."""
    folder = files("llm.sweeps") / "templates"
    template, style, script = (
        (folder / file).read_text("utf-8") for file in (f"{name}.html", "common.css", "common.js")
    )
    return Template(template).substitute(parts, style=style, script=script)

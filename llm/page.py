"""Pages that need nothing but themselves: a template of `llm/pages`, with the style and script they share."""

from importlib.resources import files
from string import Template


def filled_page(name: str, **parts: str) -> str:
    """The template `name` with its parts, which are HTML, or JSON that may stand in a script element."""
    folder = files("llm") / "pages"
    template, style, script = (
        (folder / file).read_text("utf-8") for file in (f"{name}.html", "common.css", "common.js")
    )
    return Template(template).substitute(parts, style=style, script=script)

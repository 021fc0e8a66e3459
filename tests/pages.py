"""Render the notebooks and the derivations as HTML pages that need neither Jupyter nor a network, for `make html`.

Pandoc does the work. Pictures and MathJax are inside each page.
"""

import sys
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import pypandoc
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted(ROOT.glob("hw5_*.ipynb")), ROOT / "derivations.md"]
MATHJAX = distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax/tex-svg-full.js")
STYLE = """<style>
table.dataframe { border: 0; } tbody th { text-align: left; font-weight: normal; } td { text-align: right; }
pre code { font-size: 12.5px; } summary { cursor: pointer; margin-top: 1em; }
</style>"""
OPTIONS = [
    *("--standalone", "--embed-resources", f"--mathjax={MATHJAX}", f"--lua-filter={ROOT / 'tests' / 'pages.lua'}"),
    *("--variable=lang:en", "--variable=maxwidth:64em", "--variable=mainfont:system-ui, sans-serif"),
    *("--variable=fontsize:16px", "--variable=linestretch:1.4", "--variable=monobackgroundcolor:#f6f6f6"),
    f"--variable=header-includes:{STYLE}",
]


def with_html_outputs(notebook):
    """The notebook as JSON, its Markdown outputs turned to HTML: Pandoc reads Markdown in cells, not in outputs."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(nbformat.read(notebook, as_version=4), {})
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "text/markdown" in output.get("data", {}):
            text = output.data.pop("text/markdown")
            output.data["text/html"] = pypandoc.convert_text(text, "html", "markdown", extra_args=["--mathjax"])
    return nbformat.writes(notebook)


def render(source, folder):
    """Write a notebook or a Markdown file as one HTML file into a folder. Returns its path."""
    target = Path(folder, f"{source.stem}.html")
    ipynb = source.suffix == ".ipynb"
    text, kind = (with_html_outputs(source), "ipynb") if ipynb else (source.read_text(), "gfm")
    pypandoc.convert_text(text, "html", kind, outputfile=target, extra_args=OPTIONS)
    return target


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        print(render(source, sys.argv[1]))

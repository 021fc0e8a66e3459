"""Render the notebooks and the derivations as HTML pages that need neither Jupyter nor a network, for `make html`.

Pandoc does the work. Pictures and MathJax are inside each page.
"""

import re
import sys
from importlib.metadata import distribution
from pathlib import Path

import pypandoc

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted(ROOT.glob("hw5_*.ipynb")), ROOT / "derivations.md"]
MATHJAX = distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax/tex-svg-full.js")
STYLE = """<style>
table.dataframe { border: 0; } tbody th { text-align: left; font-weight: normal; } td { text-align: right; }
pre code { font-size: 12.5px; } summary { cursor: pointer; margin-top: 1em; } .stream pre { margin: 0; }
</style>"""
OPTIONS = [
    *("--standalone", "--embed-resources", f"--mathjax={MATHJAX}", f"--lua-filter={ROOT / 'tests' / 'pages.lua'}"),
    *("--variable=lang:en", "--variable=maxwidth:64em", "--variable=mainfont:system-ui, sans-serif"),
    *("--variable=fontsize:16px", "--variable=linestretch:1.4", "--variable=monobackgroundcolor:#f6f6f6"),
    *(f"--variable=header-includes:{STYLE}", "--ipynb-output=all"),
]


def render(source, folder):
    """Write a notebook or a Markdown file as one HTML file into a folder. Returns its path."""
    target = Path(folder, f"{source.stem}.html")
    title = "--metadata=pagetitle:" + re.search(r'# ([^"\\\n]+)', source.read_text())[1]
    kind = "ipynb" if source.suffix == ".ipynb" else "gfm"
    pypandoc.convert_file(source, "html", kind, outputfile=target, extra_args=[*OPTIONS, title])
    return target


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        print(render(source, sys.argv[1]))

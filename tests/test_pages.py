"""The HTML pages of `make html`, in a headless Chromium: everything inside, everything shown."""

import json
import re
import shutil
import subprocess

import nbformat
import pytest

pages = pytest.importorskip("pages", reason="needs pypandoc and sphinx-mathjax-offline: run `make test`")
CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
REPORT = """<script>MathJax.startup.promise.then(() => {
  const count = (query) => document.querySelectorAll(query).length;
  const images = [...document.images].filter((image) => image.naturalWidth > 0).length;
  const [math, errors] = [count("mjx-container"), count("[data-mml-node=merror]")];
  document.title = "REPORT " + JSON.stringify({images, math, errors});
});</script>"""


@pytest.mark.parametrize("source", pages.SOURCES, ids=lambda source: source.stem)
def test_page_needs_nothing_from_elsewhere_and_shows_all(source, tmp_path):
    cells = nbformat.read(source, as_version=4).cells if source.suffix == ".ipynb" else []
    figures = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    path = pages.render(source, tmp_path)
    html = re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!data:|#|https://|[\w.]+\.html["#])', html)
    assert not re.search(r'<(script|img|link)[^>]*(src|href)="http', path.read_text())
    assert "IPython.core" not in html
    assert html.count("<img ") == figures
    if not CHROMIUM:
        pytest.skip("needs Chromium, to look at the page in it")
    path.write_text(path.read_text().replace("</body>", f"{REPORT}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    command += ["--enable-logging=stderr", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r"<title>REPORT (.*?)</title>", done.stdout)[1])
    assert found["images"] == figures
    assert found["errors"] == 0
    assert found["math"] == len(re.findall(r'<span class="math ', path.read_text())) > 0

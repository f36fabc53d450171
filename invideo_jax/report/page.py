"""Puts the sections of a workdir together: one self-contained HTML file, and its pictures as files."""

import os
import pathlib
from html import escape

from invideo_jax.metrics import replace_file
from invideo_jax.report import sections
from invideo_jax.report.workdir import read

_STYLE = """
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
       color: #1e293b; background: #f8fafc; margin: 0; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 18px; margin: 40px 0 12px; padding-top: 16px; border-top: 1px solid #e2e8f0; }
p { max-width: 75ch; margin: 0 0 12px; color: #475569; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px;
         margin-top: 24px; }
.card { background: #fff; border: 1px solid #e2e8f0; border-radius: 8px; padding: 12px 14px;
        color: #64748b; font-size: 13px; overflow-wrap: anywhere; }
.card b { display: block; font-size: 20px; color: #0f172a; font-weight: 600; }
img, svg { max-width: 100%; height: auto; display: block; margin: 0 0 16px; background: #fff;
           border: 1px solid #e2e8f0; border-radius: 8px; }
img { box-sizing: border-box; padding: 8px; }
figure { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); gap: 0 12px; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e2e8f0; font-size: 14px; }
td, th { text-align: left; padding: 6px 14px; border-bottom: 1px solid #e2e8f0; vertical-align: top;
         overflow-wrap: anywhere; }
th { color: #64748b; font-weight: 600; }
pre { background: #0f172a; color: #e2e8f0; border-radius: 8px; padding: 14px 16px; overflow-x: auto;
      font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre .note { color: #94a3b8; }
summary { cursor: pointer; color: #2563eb; }
"""


def build(workdir: str | os.PathLike) -> pathlib.Path:
    """Makes `workdir/report/` from what the run left in `workdir`; an older report is replaced.

    Returns:
        The path of `index.html`.

    Raises:
        UserError: no such folder, or nothing was logged in it yet.
    """
    run = read(workdir)
    files: dict[str, bytes] = {}
    body = "\n".join(filter(None, (section(run, files) for section in sections.SECTIONS)))
    name = escape(run.path.resolve().name)
    page = (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{name}: training report</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{name}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )
    folder = run.path / "report"
    for file, content in files.items():
        replace_file(folder / file, content)
    replace_file(folder / "index.html", page.encode())
    return folder / "index.html"

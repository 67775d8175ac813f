"""What mkdocs calls while it builds the site: pictures, the list of refusals, links into the source tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pictures
import sentences
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = "<!-- sentences -->"
#: Pages link to files of the repository as they lie beside docs/, so that the links work in a checkout as well.
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for name, draw in pictures.PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.svg", content=draw()))
    for path in sorted((ROOT / "benchmarks/results").glob("*.png")):
        files.append(File.generated(config, f"pictures/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    markdown = markdown.replace(SENTENCES, sentences.markdown())

    def address(match: re.Match[str]) -> str:
        image, text, name, anchor = match[1], match[2], match[3], match[4] or ""
        if not (ROOT / name).exists():
            raise SystemExit(f"{page.file.src_uri}: there is no {name}")
        if image:
            return f"![{text}](pictures/{Path(name).name})"
        kind = "tree" if (ROOT / name).is_dir() else "blob"
        return f"[{text}]({config['repo_url']}/{kind}/main/{name}{anchor})"

    return OUTSIDE.sub(address, markdown)


#: Docstrings are written for `help()` as well, in Sphinx's manner.
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(?=<code>)")


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    return ROLE.sub("", html).replace("::</p>", ":</p>")

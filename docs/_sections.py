"""Navigation that follows from the files: the reference, one page per layer of the package, and the decisions."""

import ast
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).resolve().parents[1] / "dualscan"

# From the top of the package to its foundations, as docs/architecture.md draws them.
LAYERS = {
    "ops": "Operators",
    "nn": "Modules",
    "models": "Models",
    "data": "Data",
    "generate": "Generation",
    "inspect": "Looking inside",
    "interop": "Other libraries",
    "train": "Training",
    "semiseparable": "Semiseparable matrices",
}
# Of an operator's folder, beside the public functions: its mathematics, and what goes into structured masked attention.
# The rest is how it is computed.
FOR_USERS = {"reference", "features", "heads", "masks", "neighbours"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = []
    for layer, title in LAYERS.items():
        modules = [module for path in sorted((PACKAGE / layer).rglob("*.py")) if (module := public_module(path))]
        if modules:
            pages.append(f"reference/{layer}.md")
            content = "\n".join([f"# {title}\n", *(f"::: {module}\n" for module in modules)])
            files.append(File.generated(config, pages[-1], content=content))
    decisions = sorted(file.src_uri for file in files if file.src_uri.startswith("decisions/"))
    config.nav = [*(config.nav or []), {"Reference": ["reference/index.md", *pages]}, {"Decisions": decisions}]
    return files


def public_module(path: Path) -> str | None:
    """The dotted name of a module that defines something for users or readers, or None."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    inside_operator = parts[1] == "ops" and len(parts) == 4
    if parts[-1].startswith("_") or (inside_operator and parts[-1] not in FOR_USERS):
        return None
    body = ast.parse(path.read_text(encoding="utf-8")).body
    defined = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return ".".join(parts) if any(not name.startswith("_") for name in defined) else None

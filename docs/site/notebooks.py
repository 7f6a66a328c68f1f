"""The tutorials: notebooks that are run when the site is built, each in a folder of its own.

They stand in ``docs/tutorials`` without what they print, so that a page always shows what the code
gives today. A cell that raises ends the build.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert.exporters import MarkdownExporter
from traitlets.config import Config

FOLDER = Path(__file__).parents[1] / "tutorials"
LIMIT_S = 300  # of a cell, also on a busy machine


def on_files(files: Files, config: Any) -> Files:
    """Each is a page, its figures files beside it."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        text, figures = _run(path)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, data in figures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=data))
    return files


def _run(path: Path) -> tuple[str, dict[str, bytes]]:
    notebook = nbformat.read(path, as_version=4)
    resources: dict[str, Any] = {"unique_key": path.stem, "output_files_dir": "."}
    with tempfile.TemporaryDirectory() as folder:
        # Sockets that are files of its own: nobody else on this machine can send it code.
        config = Config(AsyncKernelManager={"transport": "ipc", "ip": f"{folder}/.kernel"})
        resources["metadata"] = {"path": folder}
        client = NotebookClient(
            notebook, timeout=LIMIT_S, coalesce_streams=True, resources=resources, config=config
        )
        own = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "MLFLOW_LOGGING_LEVEL": "WARNING",  # not each step of making that database
            "PYTHONWARNINGS": "ignore:IProgress not found",  # for bars, which none shows
        }
        client.execute(env=os.environ | own)
    text, made = MarkdownExporter().from_notebook_node(notebook, resources)
    return text, {Path(name).name: data for name, data in made["outputs"].items()}

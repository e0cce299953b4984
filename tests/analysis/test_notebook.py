"""The notebook runs from top to bottom on a sweep folder."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "analysis/notebooks/data_versus_architecture.ipynb"


def test_the_stored_notebook_holds_no_output():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_the_notebook_runs_and_answers_the_question(sweep):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = next(
        index
        for index, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", [])
    )
    notebook.cells[place].source = f"from pathlib import Path\n\nsweep = {str(sweep)!r}"
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "Training on code instead of web raises loss by" in printed
    assert "quantity='tokens'" in printed

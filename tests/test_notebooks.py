"""Every notebook runs from top to bottom at toy size, and is stored without what it showed."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# What the cell of settings says here in its place. The names are those that the cell sets.
TOY = {"DOCUMENTS": 160, "STEPS": 4, "CHECKPOINTS": 2, "WORK": "here", "MODEL": "", "PEAK": 1e-3}
# Added after it: models that are requested by name are small.
SMALL = """
import gin, slm_jax.models.model_config
gin.parse_config(["model.num_layers = 1", "model.embed_dim = 32", "model.num_heads = 2", "model.num_kv_heads = 2",
                  "model.head_dim = 16", "model.mlp_dim = 64"])
"""


def read(path: Path):
    return nbformat.read(path, as_version=4)


def settings(notebook) -> dict:
    """The one cell that says how large everything is."""
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell


def test_there_are_five():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_as_readers_want_it(path):
    notebook = read(path)
    nbformat.validate(notebook)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[:2] == ["markdown", "code"] and "%pip install" in notebook.cells[1].source
    assert kinds[-1] == "markdown" and "What to try next" in notebook.cells[-1].source
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert "def " not in cell.source and "class " not in cell.source  # what is reusable belongs to the library


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = read(path)
    cell = settings(notebook)
    names = [line.split(" = ")[0] for line in cell.source.splitlines()]
    assert set(names) <= set(TOY)
    cell.source = "\n".join(f"{name} = {TOY[name]!r}" for name in names) + SMALL
    # An error of a cell is raised, with what the cell printed.
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert (tmp_path / "here").is_dir()

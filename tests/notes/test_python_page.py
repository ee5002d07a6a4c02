"""docs/python.md, which is a notebook too: as it is written, in a real kernel, interrupted."""

import json
import os
import time
from pathlib import Path

import pytest

from jaxgpt.notes import chapter, site

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python.md"
LONG = """
import jaxgpt
run = jaxgpt.launch(
    "sft", data="arithmetic", run="runs/long", train={"steps": 100000, "batch_size": 8},
    model={"context_length": 64, "num_layers": 1, "model_dim": 32, "num_heads": 2},
    eval={"every": 0}, log={"every": 1},
)
"""


def test_the_notebook_is_the_page():
    written = PAGE.with_suffix(".ipynb").read_text()
    assert written == site.notebook(chapter.read(PAGE)), (
        "run: python scripts/notes.py notebook docs/python.md"
    )


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A function from cells to a client of a kernel that works in a folder of its own."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    os.environ.pop("XLA_FLAGS", None)

    def make(book):
        book = nbformat.from_dict(book)
        where = {"metadata": {"path": str(tmp_path)}}
        return nbclient.NotebookClient(book, timeout=600, resources=where)

    return make


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_cell_runs_in_a_kernel_and_the_run_is_shown(client, tmp_path):
    made = client(json.loads(PAGE.with_suffix(".ipynb").read_text()))
    made.execute()
    outputs = [out for cell in made.nb.cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error"]
    shown = [out.data["text/html"] for out in outputs if "text/html" in out.get("data", {})]
    assert shown and "<iframe" in shown[0] and "svg" in shown[0]
    printed = "".join(out.text for out in outputs if out.output_type == "stream")
    assert "4/4" in printed  # the progress
    assert (tmp_path / "runs/python/long/config.yaml").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_interrupting_a_cell_saves_the_run_and_the_same_cell_goes_on(client, tmp_path):
    cell = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    cells = [{**cell, "id": f"c{n}", "source": LONG} for n in range(2)]
    cells.append({**cell, "id": "c2", "source": "sorted(run.series('train/loss'))[:3]"})
    made = client({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    log = tmp_path / "runs/long/metrics.jsonl"

    async def interrupt(after: int) -> None:
        import asyncio

        end = time.monotonic() + 300
        while not log.exists() or len(log.read_bytes().splitlines()) < after:
            assert time.monotonic() < end
            await asyncio.sleep(0.2)
        await made.km.interrupt_kernel()

    async def both() -> None:
        import asyncio

        async with made.async_setup_kernel():
            for number in (0, 1):
                lines = len(log.read_bytes().splitlines()) if log.exists() else 0
                stopping = asyncio.create_task(interrupt(lines + 5))
                await made.async_execute_cell(made.nb.cells[number], number)
                await stopping
            await made.async_execute_cell(made.nb.cells[2], 2)

    import asyncio

    asyncio.run(both())
    first, again, last = ("".join(out.get("text", "") for out in c.outputs) for c in made.nb.cells)
    assert "stopped and saved at step" in first, first
    assert "stopped and saved at step" in again, again
    stopped = int(first.split("stopped and saved at step ")[1].split(";")[0])
    assert int(again.split("/100000")[0].split()[-1]) > stopped
    saved = [int(path.name) for path in (tmp_path / "runs/long/checkpoints").iterdir()]
    assert len(saved) >= 2 and max(saved) < 100_000
    assert "[1, 2, 3]" in str(made.nb.cells[2].outputs), last

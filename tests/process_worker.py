"""One process of a small run: `python process_worker.py RUN`, joined as the environment says."""

import dataclasses
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxgpt import config, sharding, train
from jaxgpt.config import LogConfig, MeshConfig, TrainConfig
from jaxgpt.machine import processes


@processes.end_together()
def main(run: str) -> None:
    processes.join()
    import test_resume as small

    mesh = sharding.make_mesh(MeshConfig())
    with processes.first_process_first("run"):
        Path(run).mkdir(exist_ok=True)

    def rows_of(step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(0.02)
        if step == 30 and os.environ.get("FAILING_PROCESS") == str(jax.process_index()):
            raise RuntimeError("row 7 is odd")
        return {name: array[rows] for name, array in small.batch_of(step).items()}

    def next_batch(params, carry, step: int) -> dict:
        return sharding.place_rows(mesh, 8, lambda rows: rows_of(step, rows))

    cfg = small.run_of(Path(run), checkpoint=config.CheckpointConfig(every=20, keep=100))
    cfg = dataclasses.replace(
        cfg, train=TrainConfig(steps=5000, batch_size=8), log=LogConfig(every=1),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        train.fit(small.regression(next_batch=next_batch, evaluate=None), cfg, mesh)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    config.exit_cleanly(lambda: main(sys.argv[1]))

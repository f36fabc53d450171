"""Real processes assemble one and the same global batch, each from the rows it has read."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

BATCH = 48
WORKER = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
address, count, rank, meshes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
if count > 1:
    jax.distributed.initialize(address, count, rank)
from invideo_jax import sharding
full = np.random.default_rng(0).integers(0, 1000, (48, 5))
for sizes in meshes:
    mesh = sharding.make_mesh(**dict(zip(sharding.MESH_AXES, sizes)))
    rows = sharding.rows_of_process(mesh, 48)
    batch = sharding.global_batch({"x": full[rows].astype(np.int32)}, mesh)
    # Depends on which row is where.
    place = lambda x: (x.sum(1) * (1 + jnp.arange(48))).sum()
    with sharding.use(mesh):
        out = jax.jit(place, out_shardings=sharding.replicated(mesh))(batch["x"])
    assert batch["x"].shape == (48, 5), batch["x"].shape
    print(json.dumps([sizes, rows.tolist(), int(out)]), flush=True)
if count > 1:
    jax.distributed.shutdown()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(processes, devices, meshes):
    """What each process prints: [mesh sizes, its rows, checksum of the global batch] per mesh."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | dict(
        JAX_PLATFORMS="cpu", XLA_FLAGS=flags, PYTHONPATH=os.pathsep.join(sys.path)
    )
    address = f"127.0.0.1:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(processes), str(rank), json.dumps(meshes)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    results = []
    try:
        for process in running:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err[-2000:]
            results.append([json.loads(line) for line in out.splitlines() if line.startswith("[[")])
    finally:
        for process in running:
            process.kill()
    return results


CASES = [
    # processes, devices of each, meshes; in the last ones tensor or sequence cross processes.
    pytest.param(3, 2, [[6, 1, 1, 1], [1, 6, 1, 1], [1, 2, 3, 1]], id="3"),
    pytest.param(1, 8, [[8, 1, 1, 1], [2, 2, 2, 1]], id="1", marks=pytest.mark.slow),
    pytest.param(2, 4, [[8, 1, 1, 1], [1, 1, 8, 1]], id="2", marks=pytest.mark.slow),
    pytest.param(4, 2, [[2, 4, 1, 1], [2, 1, 1, 4]], id="4", marks=pytest.mark.slow),
    pytest.param(8, 1, [[8, 1, 1, 1], [2, 2, 2, 1]], id="8", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("processes, devices, meshes", CASES)
def test_every_number_of_processes_makes_the_same_batch(processes, devices, meshes):
    full = np.random.default_rng(0).integers(0, 1000, (BATCH, 5))
    want = int((full.sum(1) * (1 + np.arange(BATCH))).sum())
    results = launch(processes, devices, meshes)
    for i, sizes in enumerate(meshes):
        rows = []
        for result in results:
            got_sizes, got_rows, checksum = result[i]
            assert (got_sizes, checksum) == (sizes, want)
            rows += got_rows
        assert set(rows) == set(range(BATCH))
        if sizes[2] * sizes[3] == 1:
            assert len(rows) == BATCH

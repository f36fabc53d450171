"""Tests run on 8 fake CPU devices; files of shared/ are optional, and their absence is said."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

import jax  # noqa: E402
import pytest  # noqa: E402

# Programs in flight at the same time can starve each other of the threads that collectives wait in, and hang.
jax.config.update("jax_cpu_enable_async_dispatch", False)

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def shared_folder() -> pathlib.Path:
    """Where real clips and golden numbers lie: $INVIDEO_JAX_SHARED, else ../shared."""
    return pathlib.Path(os.environ.get("INVIDEO_JAX_SHARED", REPOSITORY.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder shared/; the test is skipped where it is absent."""
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(
            f"no folder {folder.name}/ beside the repository: real clips and golden files absent"
        )
    return folder

"""One local Ray cluster for all integration tests of a session."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Yield the address of a local Ray of 4 CPUs in namespace "tests", stopped at the session's end."""
    # Token authentication writes a token into HOME; a test run should leave nothing there.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Unix socket paths are limited to about 107 characters, so the folder's name is short.
    folder = tempfile.mkdtemp(prefix="tt")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=512 * 2**20,
        namespace="tests",
        _temp_dir=folder,
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

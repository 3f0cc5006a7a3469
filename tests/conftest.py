"""Fixtures shared by all test folders."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests import tiny, tiny_families

# One thread for each of pytest's workers: on tiny models, several threads wait longer than they work.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def imported_once() -> None:
    """Exclude all imported objects from garbage collection, which takes 0.3 s in each training otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Let a test choose its precision, which Accelerate fixes for a whole process at its first use."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_stable_diffusion(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_ddpm(tmp_path_factory.mktemp("tiny_ddpm"))


@pytest.fixture(scope="session")
def tiny_v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_stable_diffusion(tmp_path_factory.mktemp("tiny_v"), "v_prediction")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.build_sdxl(tmp_path_factory.mktemp("tiny_sdxl"))


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.build_sd3(tmp_path_factory.mktemp("tiny_sd3"))


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.build_flux(tmp_path_factory.mktemp("tiny_flux"))

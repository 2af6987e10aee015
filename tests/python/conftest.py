"""Fixtures of several files of tests."""

import pytest


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its precision in process-wide state; a training process has one, a test process many."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """A folder of five samples ``[4, 3, 10, 14]``, a token grid of 3 x 5 x 7 (primes), with prompts ``[3, 16]``."""
    from fpsattention.training import write_synthetic

    return write_synthetic(
        tmp_path_factory.mktemp("latents"), num_samples=5, latent_shape=(4, 3, 10, 14), text_shape=(3, 16)
    )

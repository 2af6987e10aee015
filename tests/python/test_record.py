"""Which targets a recording met, without a model: the recorder is told of forwards as the hooks tell it."""

import warnings

import pytest

from fpsattention.integrations.record import Recorder


def recorder(tmp_path, sigmas):
    return Recorder(tmp_path, None, sigmas, None, lambda _: None)


def test_targets_that_no_step_met_are_named(tmp_path):
    recording = recorder(tmp_path, [0.9, 0.5, 0.1, 0.05])
    for sigma in (1.0, 0.8, 0.4):
        recording.begin("transformer", [sigma], (3, 5, 7))
    assert recording.missed == [0.1, 0.05]
    with pytest.warns(UserWarning, match=r"sigmas 0\.1, 0\.05 were met by no step \(the lowest sigma was 0\.4\)"):
        recording.stop()
    with pytest.warns(UserWarning, match="no forward ran"):
        recorder(tmp_path, [0.9]).stop()


def test_a_target_is_met_if_either_expert_meets_it(tmp_path):
    recording = recorder(tmp_path, [0.95, 0.3])
    recording.begin("transformer", [0.9], (3, 5, 7))
    recording.begin("transformer_2", [0.2], (3, 5, 7))
    assert recording.missed == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recording.stop()
        recorder(tmp_path, None).stop()  # every sigma: nothing can be missed

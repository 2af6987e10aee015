"""Which targets a recording met, without a model: the recorder is told of forwards as the hooks tell it."""

import threading
import warnings

import pytest
import torch

from fpsattention import ConfigError
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


def test_a_forward_of_another_thread_does_not_change_what_is_recorded(tmp_path):
    recording = recorder(tmp_path, None)
    recording.begin("transformer", [0.9], (1, 1, 2))
    other = threading.Thread(
        target=recording.begin, args=("transformer", [0.9], (1, 1, 3))
    )  # known: not recorded again
    other.start()
    other.join()
    recording.save("transformer", 0, *torch.zeros(3, 1, 2, 1, 4))
    assert [file.name for file in recording.files] == ["transformer.layer000.sigma0.900000.safetensors"]


def test_a_folder_with_recordings_of_another_run_is_refused(tmp_path):
    recording = recorder(tmp_path, None)
    recording.begin("transformer", [0.9], (1, 1, 2))
    recording.save("transformer", 0, *torch.zeros(3, 1, 2, 1, 4))
    recording.stop()
    with pytest.raises(ConfigError, match=r"record: dir '.*' holds 1 \*.safetensors files, expected a new folder"):
        recorder(tmp_path, None)
    assert [file.name for file in tmp_path.iterdir()] == ["transformer.layer000.sigma0.900000.safetensors"]

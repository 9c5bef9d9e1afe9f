"""Folders of diffusers: what they say of their network, there and back."""

import json
import re

import numpy as np
import pytest

from cascaded_diffusion import export_weights, import_weights
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.interchange import reference
from tests.interchange.test_import import params_of
from tests.tiny import ROOT

CONFIG = {
    "_class_name": "UNet2DModel",
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "num_class_embeds": 10,
    "act_fn": "silu",
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 500,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
}
NETWORK = reference.Diffusers(size=16, widths=(32, 64), attention=(8,), classes=10)


def write_folder(folder, config=None, scheduler=None, tensors=None):
    from safetensors.numpy import save_file

    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    if tensors is None:
        tensors = reference.Tensors()
        NETWORK(tensors, np.zeros((1, 3, 16, 16)), [0], [0])
    save_file(dict(tensors), folder / "unet" / "diffusion_pytorch_model.safetensors")
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return dict(tensors)


def run_import(folder, workdir, *flags):
    config = f"--config={ROOT}/configs/iddpm_base64.py:smoke"
    argv = ["prog", "--source=diffusers", config, f"--workdir={workdir}", *flags]
    return import_weights.main([*argv, str(folder)])


def test_a_folder_says_what_its_network_is(tmp_path):
    write_folder(tmp_path / "theirs", scheduler=SCHEDULER)
    assert run_import(tmp_path / "theirs", tmp_path / "run") == 0
    stage = RunFolder(tmp_path / "run").read_config().stage
    assert (stage.resolution, stage.num_classes) == (16, 10)
    assert stage.network.widths == (32, 64)
    assert stage.network.attention_resolutions == (8,)
    assert stage.network.num_head_channels == 8
    assert stage.diffusion.parameterization == "v"
    assert stage.diffusion.variance == "fixed"
    # Betas from 0.0001 to 0.02 in 500 steps are half of that in 1,000.
    assert stage.schedule.linear_betas == (0.00005, 0.01)
    assert stage.schedule.num_timesteps == 500


def test_ddpm_and_what_was_tuned_from_it_come_with_its_details_and_former_names(tmp_path):
    config = {
        **{"downsample_padding": 0, "freq_shift": 1, "norm_eps": 1e-6, "flip_sin_to_cos": False},
        **{"attention_head_dim": None, "num_class_embeds": None},
    }
    network = reference.Diffusers(size=16, widths=(32, 64), attention=(8,), head_channels=64)
    tensors = reference.Tensors()
    network(tensors, np.zeros((1, 3, 16, 16)), [0])
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, x in tensors.items():
        for new, old in former.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = x
    assert "mid_block.attentions.0.query.weight" in renamed
    scheduler = {**SCHEDULER, "prediction_type": "epsilon", "variance_type": "fixed_large"}
    write_folder(tmp_path / "theirs", config, scheduler, renamed)
    features = "--config.eval.features=rotation"
    assert run_import(tmp_path / "theirs", tmp_path / "run", features) == 0
    stage = RunFolder(tmp_path / "run").read_config().stage
    assert stage.network.ddpm_details
    assert (stage.network.num_heads, stage.num_classes) == (1, 0)
    assert stage.sampler.variance == "large"

    back = tmp_path / "back"
    argv = ["prog", f"--workdir={tmp_path / 'run'}", "--source=diffusers", f"--output={back}"]
    assert export_weights.main(argv) == 0
    written = json.loads((back / "config.json").read_text())
    details = {"downsample_padding": 0, "freq_shift": 1, "norm_eps": 1e-6}
    assert {key: written[key] for key in details} == details
    assert written["num_class_embeds"] is None
    scheduler_there = json.loads((back / "scheduler_config.json").read_text())
    assert {key: scheduler_there[key] for key in scheduler} == pytest.approx(scheduler)
    assert run_import(back, tmp_path / "again", features) == 0
    first, second = (params_of(RunFolder(tmp_path / name)) for name in ("run", "again"))
    for path, x in first.items():
        np.testing.assert_array_equal(x, second[path], err_msg=path)
    again = RunFolder(tmp_path / "again").read_config().stage
    assert again.sampler == stage.sampler
    assert again.schedule.linear_betas == pytest.approx(stage.schedule.linear_betas)
    assert again.network.ddpm_details


def test_there_and_back_is_the_same_to_the_bit(tmp_path):
    tensors = write_folder(tmp_path / "theirs")
    assert run_import(tmp_path / "theirs", tmp_path / "run") == 0
    back = tmp_path / "back"
    argv = ["prog", f"--workdir={tmp_path / 'run'}", "--source=diffusers", f"--output={back}"]
    assert export_weights.main(argv) == 0
    from safetensors.numpy import load_file

    exported = load_file(back / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)
    config = json.loads((back / "config.json").read_text())
    same = [key for key in CONFIG if key != "_diffusers_version"]
    assert {key: config[key] for key in same} == {key: CONFIG[key] for key in same}
    assert run_import(back, tmp_path / "again") == 0
    first, second = (params_of(RunFolder(tmp_path / name)) for name in ("run", "again"))
    for path, x in first.items():
        np.testing.assert_array_equal(x, second[path], err_msg=path)


@pytest.mark.parametrize(
    ("config", "scheduler", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, None, "_class_name = 'UNet2DConditionModel': ex"),
        (
            {"downsample_padding": 0},
            None,
            "downsample_padding = 0, freq_shift = 0, norm_eps = 1e-05: expected downsample_padding"
            " = 1, freq_shift = 0, norm_eps = 1e-05, or as DDPM has it downsample_padding = 0,",
        ),
        ({"norm_eps": 1e-6}, None, "norm_eps = 1e-06: expected downsample_padding = 1, freq_"),
        ({"freq_shift": 1, "norm_eps": 1e-6}, None, "downsample_padding = 1, freq_shift = 1, norm"),
        ({"resnet_time_scale_shift": "scale_shift"}, None, "= 'scale_shift': expected 'default'"),
        ({"up_block_types": ["UpBlock2D"] * 2}, None, "and the same on the way up"),
        ({"sample_size": [16, 32]}, None, "sample_size = [16, 32]: expected a square"),
        ({"sample_size": None}, None, "not the config of a UNet2DModel (TypeError"),
        ({"out_channels": 4}, None, "out_channels = 4: expected 3 or 6"),
        ({}, {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid': expected 'linear' or"),
        ({}, {"trained_betas": [0.1] * 10}, "trained_betas is set: expected None"),
        ({}, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is set: expected False"),
        ({}, {"beta_start": "a"}, "not the config of a scheduler (TypeError"),
        ({}, {"prediction_type": ["epsilon"]}, "not the config of a scheduler (TypeError"),
        ({"up_block_types": ["AttnSkipUpBlock2D", "UpBlock2D"]}, None, "the same on the way up"),
        ({}, {"prediction_type": "flow"}, "prediction_type = 'flow': expected one of"),
        (
            {},
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0},
            "_class_name = 'FlowMatchEulerDiscreteScheduler': expected one of ['DDIMParallelSch",
        ),
    ],
)
def test_what_our_unet_cannot_be_is_refused(config, scheduler, message, tmp_path):
    tensors = {"conv_in.weight": np.zeros((1, 1), np.float32)}
    write_folder(tmp_path / "theirs", config, scheduler, tensors)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        run_import(tmp_path / "theirs", tmp_path / "run")
    assert "config.json: " in str(error.value)


def test_our_own_export_that_is_told_no_step_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    write_folder(tmp_path / "theirs")
    weights = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        weights = tmp_path / "theirs" / "unet" / weights.name
    tensors = load_file(weights)
    save_file(tensors, weights, metadata={"timesteps": "1000 * sqrt(sigmoid(logsnr))"})
    with pytest.raises(UserError, match=r"told 1000 \* sqrt.*; expected one that is told the step"):
        run_import(tmp_path / "theirs", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_weights_is_said(tmp_path):
    (tmp_path / "theirs").mkdir()
    with pytest.raises(UserError, match="has no config.json beside a diffusion_pytorch_model"):
        run_import(tmp_path / "theirs", tmp_path / "run")

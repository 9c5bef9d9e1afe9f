"""Overrides of a config on the command line."""

from absl import flags

from cascaded_diffusion.commands import config_flags, overrides
from cascaded_diffusion.config.run_checks import (
    cascade_config_from,
    run_config_from,
)
from tests.config.test_shipped_configs import STAGES
from tests.tiny import ROOT, config_values

BASE = f"--config={ROOT}/configs/mnist_base16.py:smoke"
CASCADE = f"--config={ROOT}/configs/mnist_cascade32.py"


def test_overrides_reach_keys_of_every_type():
    fv = flags.FlagValues()
    argv = [
        "prog",
        BASE,
        "--config.stage.schedule.num_timesteps=1000",
        "--config.stage.network.channel_mults=(1, 1)",
        "--config.stage.network.scale_skips=true",
        "--config.train.learning_rate=1e-4",
        "--config.data.eval_split=train",
    ]
    config_flags.define_config(fv, argv, "")
    config_flags.parse(fv, argv, "")
    config = run_config_from(config_flags.config_values(fv, argv))
    assert config.stage.schedule.num_timesteps == 1000
    assert config.stage.network.channel_mults == (1, 1)
    assert config.stage.network.scale_skips is True
    assert config.train.learning_rate == 1e-4
    assert config.data.eval_split == "train"


def test_an_override_changes_one_section_alone():
    # The file may give two sections the same dict.
    for name in STAGES:
        values = config_values(name)
        if values["stage"].get("low_res_schedule") is None:
            continue
        path = "--config.stage.low_res_schedule.num_timesteps=77"
        changed = overrides.with_overrides(values, ["prog", path])["stage"]
        assert changed["low_res_schedule"]["num_timesteps"] == 77
        assert changed["schedule"] == values["stage"]["schedule"]
        assert values["stage"]["low_res_schedule"].get("num_timesteps") != 77


def test_overrides_count_in_tuples():
    fv = flags.FlagValues()
    argv = ["prog", CASCADE, "--config.cascade.samplers.1.num_steps=5"]
    config_flags.define_config(fv, argv, "")
    config_flags.parse(fv, argv, "")
    section = cascade_config_from(config_flags.config_values(fv, argv)).cascade
    assert [s.num_steps for s in section.samplers] == [10, 5]

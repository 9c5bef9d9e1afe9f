"""Every config file that comes with the package."""

import json
import shutil

import pytest

from cascaded_diffusion.commands import config_flags
from cascaded_diffusion.config.run_checks import (
    cascade_config_from,
    check_chain,
    check_devices,
    run_config_from,
)
from cascaded_diffusion.config.schema import to_dict
from cascaded_diffusion.errors import UserError
from tests.tiny import ROOT, config_values

_FILES = {path.stem for path in (ROOT / "configs").glob("*.py")}
_KINDS = {name: set(config_values(name)) for name in sorted(_FILES - {"sections"})}
CASCADES = [name for name, sections in _KINDS.items() if sections == {"cascade", "mesh"}]
STAGES = [name for name, sections in _KINDS.items() if "stage" in sections]
PAPER = {"base32", "sr64", "sr128", "sr256", "cascade64", "cascade128", "cascade256"}
PAPER |= {"base16", "sr64_from16", "base64", "lsun_base64", "lsun_sr128"}


def test_every_config_file_is_a_stage_or_a_cascade():
    assert {*STAGES, *CASCADES, "sections"} == _FILES


def test_every_model_of_the_paper_has_its_config():
    assert PAPER <= _FILES


@pytest.mark.parametrize("variant", [None, "smoke"])
@pytest.mark.parametrize("name", STAGES)
def test_shipped_configs_are_good_and_survive_json(name, variant):
    config = run_config_from(config_values(name, variant))
    assert run_config_from(json.loads(json.dumps(to_dict(config)))) == config
    check_devices(config, config.mesh.fsdp_size)
    check_devices(config, 8 * config.mesh.fsdp_size)
    # A run folder has the stage's name; a cascade finds it by that.
    assert name.removeprefix("mnist_").removeprefix("cifar10_") == config.stage.name


@pytest.mark.parametrize("variant", [None, "smoke"])
@pytest.mark.parametrize("name", CASCADES)
def test_the_shipped_cascades_chain(name, variant):
    config = cascade_config_from(config_values(name, variant))
    assert cascade_config_from(json.loads(json.dumps(to_dict(config)))) == config
    files = [file.removesuffix(":smoke") for file in config.cascade.configs]
    assert all((variant == "smoke") == (":smoke" in file) for file in config.cascade.configs)
    stages = [
        run_config_from(config_values(file.removesuffix(".py"), variant)).stage for file in files
    ]
    check_chain(config.cascade, stages)
    assert tuple(stage.name for stage in stages) == config.cascade.stages


def test_the_ablation_is_a_variant():
    config = run_config_from(config_values("mnist_sr32", "no_augment"))
    assert config.stage.augment.name == "none"


def test_every_smoke_variant_has_the_structure_of_the_whole_model():
    for name in STAGES:
        whole, small = (run_config_from(config_values(name, v)).stage for v in (None, "smoke"))
        assert whole.diffusion == small.diffusion, name
        assert whole.augment == small.augment, name
        assert whole.sampler.name == small.sampler.name, name
        assert whole.schedule.name == small.schedule.name, name
        assert whole.schedule.noise_levels == small.schedule.noise_levels, name
        for key in ("name", "resample", "scale_shift", "scale_skips", "noise_input", "upsample"):
            assert getattr(whole.network, key) == getattr(small.network, key), (name, key)
        if whole.low_res_resolution is not None:
            factor = whole.resolution / whole.low_res_resolution
            assert factor == small.resolution / small.low_res_resolution, name


def test_a_config_copied_without_its_sections_is_refused_in_one_line(tmp_path):
    shutil.copy(ROOT / "configs" / "base32.py", tmp_path)
    expected = "base32.py: cannot be loaded .No module named 'sections'.; expected it beside"
    with pytest.raises(UserError, match=expected):
        config_flags.load_config_file(tmp_path, "base32.py")

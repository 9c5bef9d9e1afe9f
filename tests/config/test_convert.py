"""Keys that are missing, and values of the wrong type."""

import pytest

from cascaded_diffusion.config.run_checks import (
    run_config_from,
)
from cascaded_diffusion.errors import UserError
from tests.tiny import config_values, with_overrides


@pytest.mark.parametrize("key", ["train.seed", "train.learning_rate", "data.name", "train"])
def test_an_integer_too_long_to_print_is_refused_in_one_line(key):
    values = with_overrides(config_values("mnist_base16"), {key: 10**5000})
    with pytest.raises(UserError, match=rf"^config.{key} = \(an int too long to print\): expected"):
        run_config_from(values)


def test_keys_that_may_be_none_may_be_left_out():
    values = config_values("mnist_base16")
    assert "linear_betas" not in values["stage"]["schedule"]
    assert run_config_from(values).stage.schedule.linear_betas is None


def test_missing_keys_are_named():
    values = config_values("mnist_base16")
    del values["train"]["adam_b2"]
    with pytest.raises(UserError, match="^config.train.adam_b2 is missing$"):
        run_config_from(values)
    del values["mesh"]
    with pytest.raises(UserError):
        run_config_from(values)

"""What may change in the config of a run that is resumed."""

import pytest

from cascaded_diffusion.config.resume_checks import check_resume
from cascaded_diffusion.errors import UserError
from tests.tiny import round_trip, tiny_base


def test_how_a_run_is_computed_may_change_when_it_is_resumed():
    config = tiny_base()
    other = round_trip(
        config, train__accumulation_steps=2, train__remat="everything", mesh__tensor=2
    )
    assert len(check_resume(config, other, "RUN")) == 3


def test_resuming_with_another_config():
    config = tiny_base()
    assert check_resume(config, config, "RUN") == []
    longer = round_trip(config, train__train_steps=99, eval__patience_evals=9)
    assert check_resume(config, longer, "RUN") == [
        "config.train.train_steps: 30 -> 99",
        "config.eval.patience_evals: 5 -> 9",
    ]
    for key, value in (
        ("train__seed", 1),
        ("stage__network__channels", 16),
        ("train__batch_size", 32),
    ):
        with pytest.raises(UserError, match="set it back, or choose another --workdir"):
            check_resume(config, round_trip(config, **{key: value}), "RUN")

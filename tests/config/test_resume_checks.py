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
        with pytest.raises(
            UserError, match="set it back, choose another --workdir, or change what"
        ):
            check_resume(config, round_trip(config, **{key: value}), "RUN")


def test_what_leaves_images_out_may_not_change():
    config, changes = tiny_base(), {"data__max_pixels": 5}
    assert check_resume(config, round_trip(config, **changes), "RUN")  # a larger image would fail
    skips = round_trip(config, data__on_corrupt="skip")
    assert check_resume(config, skips, "RUN") == ["config.data.on_corrupt: 'fail' -> 'skip'"]
    with pytest.raises(UserError, match=r"config.data.max_pixels = 5: .* --allow_changed=data.max"):
        check_resume(skips, round_trip(skips, **changes), "RUN")


def test_keys_that_are_allowed_may_change_what_is_trained():
    config = tiny_base()
    other = round_trip(config, train__batch_size=32, train__learning_rate=0.5)
    with pytest.raises(UserError, match=r"--allow_changed=train\.learning_rate"):
        check_resume(config, other, "RUN", allowed=["train.batch_size"])
    for allowed in (["train.batch_size", "train.learning_rate"], ["train"], ["train."]):
        assert len(check_resume(config, other, "RUN", allowed=allowed)) == 2
    for wrong in ("batch_size", "train.batch", ""):
        with pytest.raises(UserError, match=f"--allow_changed={wrong}: expected config keys"):
            check_resume(config, other, "RUN", allowed=[wrong])

"""`evaluate`'s modes: named before the flags, or implied by them."""

import pytest

from cascaded_diffusion import evaluate
from cascaded_diffusion.commands import evaluate_flags as lib
from cascaded_diffusion.commands.config_flags import parse
from cascaded_diffusion.errors import UserError


def _mode(*arguments):
    mode, argv = lib.split_mode(["evaluate", *arguments])
    fv = lib.define_evaluate(argv)
    parse(fv, argv, "")
    return lib.check_mode(fv, argv, mode)


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        (["--workdir=R"], "checkpoints"),
        (["--workdir=R", "--final"], "final"),
        (["--workdir=R", "--sweep"], "sweep"),
        (["--workdir=R", "--samples=a.npz"], "samples"),
        (["--workdir=R", "--samples=a.npz", "--cas"], "cas"),
        (["--workdir=R", "--bits_per_dim=test", "--num_steps=9"], "bits_per_dim"),
    ],
)
def test_a_mode_is_named_or_implied(flags, mode):
    assert _mode(*flags) == mode
    assert _mode(mode, *flags) == mode
    switches = ("--final", "--sweep", "--cas")
    assert _mode(mode, *(flag for flag in flags if flag not in switches)) == mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finals"], "'finals': expected a flag, or one of bits_per_dim, cas, checkpoints, final,"),
        (
            ["final", "--sweep"],
            "--sweep does not go with `evaluate final`: leave one of them out",
        ),
        (
            ["checkpoints", "--num_images=3"],
            "--num_images does not go with `evaluate checkpoints`; it is for `evaluate bits_per_",
        ),
        (
            ["samples", "--config.eval.seed=1"],
            "--config.eval.seed=1: only for `evaluate sweep` and",
        ),
    ],
)
def test_what_a_mode_does_not_take_is_refused(arguments, message):
    with pytest.raises(UserError) as error:
        _mode(*arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("mode", ["sweep", "final", "cas", "bits_per_dim", "checkpoints"])
def test_every_mode_but_samples_needs_a_run(mode):
    with pytest.raises(UserError, match="^--workdir is missing: "):
        evaluate.main(["evaluate", mode])
    with pytest.raises(UserError, match="^--samples is missing: "):
        evaluate.main(["evaluate", "samples"])

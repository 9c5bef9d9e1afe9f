"""Any text for any key: a checked config, or an error of one line that names the key."""

import contextlib
import dataclasses
import io
import math
import random
import sys
import types
import typing

import pytest

from cascaded_diffusion.commands import entry, overrides
from cascaded_diffusion.config.run_checks import cascade_config_from, check_chain, run_config_from
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig, to_dict
from cascaded_diffusion.errors import UserError
from tests.tiny import config_values

_NASTY = (
    *("", " ", "None", "True", "nan", "inf", "-inf", "1e400", "-1e400", "1e-400", "1e300", "-0.0"),
    *("0", "1", "-1", "2", "3", "7", "8", "15", "16", "64", "1.5", "0.5", "1e-6", "0.999999"),
    *(str(10**k) for k in (3, 6, 9, 12, 30, 400)),
    *(str(2**k - d) for k in (31, 32, 63, 64) for d in (0, 1)),
    *("9" * 5000, "-" * 3000 + "1", "(" * 5000, "[" * 300 + "]" * 300, "{" * 200, "x" * 5000),
    *("()", "(1,)", "(1, 2)", "(0,)", "(-1, 1)", "(1, 1.5)", "((1,),)", "[]", "[1, 2]", "{}"),
    *("(1, 1099511627776)", f"({'1, ' * 17})", f"({'16, ' * 16})", "(0.9, nan)", "(1e999,)"),
    *("{'a': 1}", "{1: 2}", "{(): 3}", "{[]: 1}", "b'x'", "1j", "...", "10**30", "0x10", "2024_05"),
    *("a\0b", "'\\0'", "\ud800", "'\\ud800'", "caf\udce9", "a\nb", "\x1b[2J", "é" * 3000, "٣"),
    *("'a'", '"a', "../..", "/", "gs://bucket/x", "run[1]", "*", "a" * 300 + "/b", "%s{}{0}"),
    *("base", "super_resolution", "cosine", "linear", "shifted_cosine", "efficient_unet", "biggan"),
    *("ancestral", "heun", "learned", "hybrid", "vlb", "blur", "gaussian", "everything", "folder"),
    *("discrete", "continuous", "inception", "resnet", "snr", "v", "dynamic", "stored", "shapes"),
    *("step_index", "scaled_step_index", "respaced", "ddim_respaced"),
)


def _keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for field, hint in typing.get_type_hints(cls).items():
        if isinstance(hint, types.UnionType):
            hint = next(h for h in typing.get_args(hint) if h is not type(None))
        keys.append(prefix + field)
        if typing.get_origin(hint) is tuple:
            hint = typing.get_args(hint)[0]
            keys.append(f"{prefix}{field}.0")
            if dataclasses.is_dataclass(hint):
                keys += _keys(hint, f"{prefix}{field}.1.")
        elif dataclasses.is_dataclass(hint):
            keys += _keys(hint, f"{prefix}{field}.")
    return keys


def _numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for item in value for n in _numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def fuzz(seed: int, count: int) -> int:
    """Tries `count` command lines; returns how many of them are good ones."""
    rng, good = random.Random(seed), 0
    runs = [config_values(f"mnist_{name}") for name in ("base16", "sr32")]
    runs.append(config_values("modern_sr256"))
    stages = [run_config_from(values).stage for values in runs[:2]]
    cascade = config_values("mnist_cascade32")
    keys = {False: _keys(RunConfig), True: _keys(CascadeConfig)}
    for _ in range(count):
        is_cascade = rng.random() < 0.2
        values = cascade if is_cascade else rng.choice(runs)
        argv = ["prog"]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            key = rng.choice(keys[is_cascade])
            if rng.random() < 0.03:
                key += rng.choice((".", "..", ".x", ".0", ".0.x.y", "." + "9" * 5000, "\n", "٣"))
            argv.append(f"--config.{key}={rng.choice(_NASTY)}")
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                changed = overrides.with_overrides(values, argv)
                if is_cascade:
                    config = cascade_config_from(changed)
                    check_chain(config.cascade, stages)
                else:
                    config = run_config_from(changed)
        except UserError as e:
            assert str(e).strip(), argv
            sys.argv = argv
            assert "\n" not in entry.one_line(e), argv
            continue
        except BaseException as e:
            raise AssertionError(f"{argv}: {type(e).__name__}: {e}") from e
        good += 1
        assert said.getvalue() == "", argv
        assert all(math.isfinite(n) and abs(n) <= 1e12 for n in _numbers(to_dict(config))), argv
    return good


@pytest.mark.filterwarnings("ignore")
def test_any_value_of_any_key_is_checked_or_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])
    assert 300 < fuzz(seed=0, count=20_000) < 19_000

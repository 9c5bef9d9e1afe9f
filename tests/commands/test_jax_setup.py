"""What all binaries set up."""

import functools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import jax
import numpy as np
import pytest
from absl import flags

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.commands import config_flags, flag_checks, jax_setup
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.training import loop
from tests.tiny import ROOT, tiny_base

_COMPILE = """
import os, sys
if sys.argv[1] != "all":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from cascaded_diffusion.commands import jax_setup
jax = jax_setup.set_up_jax()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8)))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
def test_programs_compiled_on_one_cpu_are_not_taken_on_several(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "NPROC")}

    def folders_after(cpus, **more):
        subprocess.run(
            [sys.executable, "-c", _COMPILE, cpus],
            env={**env, "HOME": str(tmp_path), **more},
            check=True,
        )
        cache = tmp_path / ".cache" / "cascaded_diffusion" / "xla"
        assert all(any(folder.iterdir()) for folder in cache.iterdir())
        return {folder.name for folder in cache.iterdir()}

    assert folders_after("one") == {"1cpus"}
    everything = f"{len(os.sched_getaffinity(0))}cpus"
    assert folders_after("all") == {"1cpus", everything}
    assert folders_after("all", NPROC="3") == {"1cpus", everything, "3cpus"}


def test_a_cache_named_by_the_user_is_taken(tmp_path):
    cache = tmp_path / "mine"
    subprocess.run(
        [sys.executable, "-c", _COMPILE, "all"],
        env={**os.environ, "HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(cache)},
        check=True,
    )
    assert any(cache.iterdir())
    assert not (tmp_path / ".cache").exists()


_PROBE = """
import json, os, resource
import numpy as np
from cascaded_diffusion.commands import jax_setup
jax = jax_setup.set_up_jax(platform=os.environ.get("PROBED_PLATFORM"))
found = dict(xla_flags=os.environ["XLA_FLAGS"])
if "memory" in os.environ["PROBED"]:
    faults = found["page_faults"] = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"x" * (100 << 20)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if "programs" in os.environ["PROBED"]:
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 2000, lambda _, x: jax.numpy.sin(x @ x), x))
    found["ready"] = step(np.ones((128, 128), np.float32)).is_ready()
    x = np.linspace(-20, 20, 256, dtype=np.float32)
    found["values"] = {
        name: [jax.jit(getattr(jax.numpy, name))(x).tolist(), getattr(np, name)(x).tolist()]
        for name in ("arctan", "exp", "tanh", "sin", "cos", "expm1")
    }
    found["x64"] = jax.config.jax_enable_x64
    found["dtype"] = str(jax.numpy.arange(2.0).dtype)
found |= dict(backend=jax.default_backend(), platforms=jax.config.jax_platforms)
print(json.dumps(found))
"""
_OWN_FLAG = "--xla_cpu_experimental_ynn_fusion_type=dot"
_OWN_TUNABLES = "glibc.malloc.mmap_max=65536"
# One process for each environment; its tests look at one thing each. It probes what they ask for.
_ENVIRONMENTS = {
    "plain": {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "PROBED": "memory and programs",
    },
    "tuned": {
        "XLA_FLAGS": _OWN_FLAG,
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": _OWN_TUNABLES,
        "PROBED": "memory",
    },
    # A platform that is not there, or somebody else's.
    "elsewhere": {"JAX_PLATFORMS": "tpu", "PROBED_PLATFORM": "cpu", "PROBED": ""},
}


@functools.cache
def _probed(name):
    env = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    result = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env={**env, **_ENVIRONMENTS[name]},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(result.stdout)


@pytest.mark.skipif(
    not jax_setup.CPU_FLAG_VERSIONS[0]
    <= tuple(int(x) for x in version("jaxlib").split(".")[:2])
    <= jax_setup.CPU_FLAG_VERSIONS[1],
    reason="a flag this jaxlib may not know is left out",
)
@pytest.mark.parametrize("given", ["", _OWN_FLAG])
def test_the_flag_for_the_cpu_is_set_unless_the_user_set_it(given):
    found = _probed("tuned" if given else "plain")["xla_flags"]
    assert found.split() == [given or "--xla_cpu_experimental_ynn_fusion_type="]


def test_on_one_cpu_device_a_call_returns_when_the_step_is_done():
    assert _probed("plain")["ready"] is True


def test_with_the_flags_of_the_binaries_functions_are_what_they_are():
    # Vectors of 512 bits are a flag with which arctan is not.
    for name, (found, exact) in _probed("plain")["values"].items():
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize("given", [None, _OWN_TUNABLES])
def test_on_a_cpu_freed_memory_is_kept_unless_the_user_tuned_malloc(given):
    first, *later = _probed("tuned" if given else "plain")["page_faults"]
    # 100 MB, in pages of 4 KB or of 2 MB, from the kernel: the first time, or every time.
    assert first > 40
    assert max(later) < 20 if given is None else min(later) > 40


def test_a_program_for_the_cpu_leaves_other_platforms_alone():
    found = _probed("elsewhere")
    assert (found["backend"], found["platforms"]) == ("cpu", "cpu")


def test_whatever_the_environment_says_binaries_compute_with_32_bits():
    found = _probed("plain")
    assert (found["x64"], found["dtype"]) == (False, "float32")


BASE = f"--config={ROOT}/configs/mnist_base16.py:smoke"


def _main(*argv, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "cascaded_diffusion.main", BASE, *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", ["cuda", "tpu", "nonsense"])
def test_a_platform_that_is_not_there_is_one_line(name, tmp_path):
    if any(device.platform == name for device in jax.devices()):
        pytest.skip("it is there")
    found = _main(cwd=tmp_path, JAX_PLATFORMS=name)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"error: JAX_PLATFORMS={name}: ")
    assert line.endswith("; here there is cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_library_refuses_64_bits_and_writes_nothing(tmp_path):
    config = tiny_base()
    with jax.enable_x64(True):
        with pytest.raises(UserError, match="jax_enable_x64 is on: expected off"):
            build_stage(config.stage)
        with pytest.raises(UserError, match="jax_enable_x64 is on: expected off"):
            loop.train(config, RunFolder(tmp_path), iter, image_shape=(32, 32, 1), grid_examples={})
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_prepared_by_the_command_as_typed(tmp_path):
    found = _main(
        "--config.data.name=folder",
        "--config.data.path=my photos",
        "--config.data.prepared_dir=there",
        cwd=tmp_path,
    )
    assert found.returncode == 2
    assert f"prepare {BASE} --config.data.name=folder '--config.data.path=my photos'" in (
        found.stderr.replace(str(tmp_path) + "/", "")
    ), found.stderr
    assert "..." not in found.stderr


def _values(*argv):
    fv = flags.FlagValues()
    argv = ["prog", BASE, *argv]
    config_flags.define_config(fv, argv, "")
    config_flags.parse(fv, argv, "")
    return config_flags.config_values(fv, argv)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024_05", "2024_05"),
        ("True", "True"),
        ("1e3", "1e3"),
        ("(a)", "(a)"),
        ("(1, 2)", "(1, 2)"),
        ("0x10", "0x10"),
        ("nan", "nan"),
        ("", ""),
        ("None", None),
        ("'None'", "None"),
        ("'a b'", "a b"),
        ('"2024"', "2024"),
        ("'it", "'it"),
        ("caf\udce9", "caf\udce9"),  # a file's name that is not UTF-8
    ],
)
def test_text_stays_as_typed(text, value):
    assert _values(f"--config.data.path={text}")["data"]["path"] == value
    # No key of text may become something else; what may not be None is its name.
    name = _values(f"--config.data.name={text}")["data"]["name"]
    assert name == ("None" if text == "None" else value)


def test_numbers_are_numbers_all_the_same():
    values = _values("--config.train.seed=2_0", "--config.train.remat=None", "--config.x=1")
    assert values["train"]["seed"] == 20
    assert values["train"]["remat"] is None
    assert values["x"] == 1  # refused by name later


_IMPORTING = """
from ml_collections import ConfigDict
import shared_settings
import helpers.sizes

def get_config(variant=None):
    return ConfigDict(dict(value=shared_settings.VALUE, size=helpers.sizes.SIZE, variant=variant))
"""


def test_a_config_imports_what_lies_beside_it_and_no_other_does(tmp_path):
    before = list(sys.path)
    for number in (1, 2):
        folder = tmp_path / str(number)
        (folder / "helpers").mkdir(parents=True)
        (folder / "config.py").write_text(_IMPORTING)
        (folder / "shared_settings.py").write_text(f"VALUE = {number}\n")
        (folder / "helpers" / "sizes.py").write_text(f"SIZE = {10 * number}\n")
    for number in (1, 2, 1):
        values = config_flags.load_config_file(tmp_path / str(number), "config.py:small")
        assert values == {"value": number, "size": 10 * number, "variant": "small"}
        assert sys.path == before
        assert not {"shared_settings", "helpers", "helpers.sizes"} & set(sys.modules)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "config.py").write_text(_IMPORTING)
    expected = "cannot be loaded .No module named 'shared_settings'.; expected it beside the config"
    with pytest.raises(UserError, match=expected):
        config_flags.load_config_file(tmp_path / "3", "config.py")
    assert sys.path == before


def test_paths_of_flags_are_checked_by_name():
    fv = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=fv)
    flags.DEFINE_list("low_res_run", [], "", flag_values=fv)
    fv(["prog"])
    flag_checks.check_paths(fv, "workdir", "low_res_run")
    fv(["prog", "--low_res_run=a,b[1]"])
    with pytest.raises(UserError, match=r"^--low_res_run=b\[1\]: "):
        flag_checks.check_paths(fv, "workdir", "low_res_run")


def _interrupted(args, tmp_path, *, begun, secs, times=1):
    """What Python says that is sent SIGINT some time after it said `begun`, imports left out."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *args],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if begun in line:
                break
        time.sleep(secs)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        said = [line for line in process.stderr if not line.startswith("import time:")]
        process.wait(timeout=60)
    finally:
        process.kill()
    return process.returncode, said


# From the package's first line on: before it, the interpreter answers by itself.
@pytest.mark.parametrize(("secs", "times"), [(0.0, 1), (0.1, 3), (0.3, 1), (0.8, 2), (1.5, 3)])
def test_ctrl_c_ends_a_binary_that_is_starting(secs, times, tmp_path):
    args = ["-m", "cascaded_diffusion.main", BASE]
    found = _interrupted(
        args,
        tmp_path,
        begun="cascaded_diffusion.commands.interrupts",
        secs=secs + 0.01,
        times=times,
    )
    assert found == (130, ["interrupted\n"])


_SWALLOWS = """
import sys, time
from cascaded_diffusion.commands import entry
from cascaded_diffusion.commands.interrupts import INTERRUPTS

class Slow:
    def __del__(self):
        time.sleep(30)

def main(argv):
    INTERRUPTS.at_once = False  # as after set_up_jax
    print("it begins", file=sys.stderr, flush=True)
    {body}
    return 0

entry.run(main)
"""
_BODIES = {
    "in a destructor": "s = Slow(); del s",
    "made another error": """
    try:
        time.sleep(30)
    except KeyboardInterrupt as e:
        raise ImportError("a library's own") from e""",
    "as it should be": "time.sleep(30)",
}


@pytest.mark.parametrize("body", _BODIES)
def test_ctrl_c_is_not_swallowed(body, tmp_path):
    args = ["-c", _SWALLOWS.replace("{body}", _BODIES[body])]
    found = _interrupted(args, tmp_path, begun="it begins", secs=0.5)
    assert found == (130, ["interrupted\n"])


def test_importing_the_package_leaves_signals_alone():
    code = (
        "import signal, sys; before = signal.getsignal(signal.SIGINT), sys.unraisablehook;"
        " import cascaded_diffusion, cascaded_diffusion.main;"
        " assert before == (signal.getsignal(signal.SIGINT), sys.unraisablehook)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_sigterm_ends_what_may_be_killed_with_the_code_to_run_again():
    code = (
        "import time; from cascaded_diffusion.commands import entry;"
        " entry.end_at_once_upon_sigterm(); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (75, "stopped by a signal; run it again\n")

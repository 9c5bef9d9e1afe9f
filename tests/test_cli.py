"""What all binaries set up."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version

import pytest

from cascaded_diffusion import cli

_SET_UP = """
import os
from cascaded_diffusion import cli
cli.set_up_jax()
"""
_COMPILE = """
import os, sys
if sys.argv[1] != "all":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from cascaded_diffusion import cli
jax = cli.set_up_jax()
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


@pytest.mark.skipif(
    not cli.CPU_FLAG_VERSIONS[0]
    <= tuple(int(x) for x in version("jaxlib").split(".")[:2])
    <= cli.CPU_FLAG_VERSIONS[1],
    reason="a flag this jaxlib may not know is left out",
)
@pytest.mark.parametrize("given", ["", "--xla_cpu_experimental_ynn_fusion_type=dot"])
def test_the_flag_for_the_cpu_is_set_unless_the_user_set_it(given):
    result = subprocess.run(
        [sys.executable, "-c", _SET_UP + "print(os.environ['XLA_FLAGS'])"],
        env={**os.environ, "XLA_FLAGS": given},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert result.stdout.split() == [given or "--xla_cpu_experimental_ynn_fusion_type="]


_STEP = """
import numpy as np
from cascaded_diffusion import cli
jax = cli.set_up_jax()
step = jax.jit(lambda x: jax.lax.fori_loop(0, 2000, lambda _, x: jax.numpy.sin(x @ x), x))
print(step(np.ones((128, 128), np.float32)).is_ready())
"""


def test_on_one_cpu_device_a_call_returns_when_the_step_is_done():
    result = subprocess.run(
        [sys.executable, "-c", _STEP],
        env={**os.environ, "XLA_FLAGS": ""},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert result.stdout == "True\n"


_FUNCTIONS = """
import numpy as np
from cascaded_diffusion import cli
jax = cli.set_up_jax()
x = np.linspace(-20, 20, 256, dtype=np.float32)
for name in ("arctan", "exp", "tanh", "sin", "cos", "expm1"):
    found = jax.jit(getattr(jax.numpy, name))(x)
    np.testing.assert_allclose(found, getattr(np, name)(x), rtol=1e-4, atol=1e-5, err_msg=name)
"""


def test_with_the_flags_of_the_binaries_functions_are_what_they_are():
    # Vectors of 512 bits are a flag with which arctan is not.
    subprocess.run(
        [sys.executable, "-c", _FUNCTIONS], env={**os.environ, "XLA_FLAGS": ""}, check=True
    )


_ALLOCATE = """
import resource
from cascaded_diffusion import cli
cli.set_up_jax()
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (100 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize("given", [None, "glibc.malloc.mmap_max=65536"])
def test_on_a_cpu_freed_memory_is_kept_unless_the_user_tuned_malloc(given):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env.pop("GLIBC_TUNABLES", None)
    result = subprocess.run(
        [sys.executable, "-c", _ALLOCATE],
        env=env if given is None else {**env, "GLIBC_TUNABLES": given},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    first, *later = (int(x) for x in result.stdout.split())
    # 100 MB, in pages of 4 KB or of 2 MB, from the kernel: the first time, or every time.
    assert first > 40
    assert max(later) < 20 if given is None else min(later) > 40


_PLATFORM = """
from cascaded_diffusion import cli
jax = cli.set_up_jax(platform="cpu")
print(jax.default_backend(), jax.config.jax_platforms)
"""


def test_a_program_for_the_cpu_leaves_other_platforms_alone():
    env = {**os.environ, "JAX_PLATFORMS": "tpu"}  # which is not there, or somebody else's
    result = subprocess.run(
        [sys.executable, "-c", _PLATFORM], env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    assert result.stdout.split() == ["cpu", "cpu"]

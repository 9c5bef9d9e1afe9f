"""How the tests have XLA compile."""

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from unittest import mock

# jaxlib 0.12 has no such flag any more, and an unknown one is fatal.
_HAS_EMITTERS = tuple(int(x) for x in version("jaxlib").split(".")[:2]) < (0, 12)


def _emitters(use: bool) -> dict[str, bool | int]:
    return {"xla_cpu_use_fusion_emitters": use} if _HAS_EMITTERS else {}


# Nearly all of the suite's time is compilation, so XLA spends little on optimization.
QUICK = {
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": True,
    **_emitters(True),
}
# For programs that run a few times: a training step compiles in a third of the time and runs half
# as fast. Nothing is optimized, and no fusion has a compiler's pipeline of its own, which at level
# 0 takes most of the time. Nor is a program cut in parts for other threads to compile, which costs
# a third more.
QUICKEST = {
    "xla_backend_optimization_level": 0,
    **_emitters(False),
    "xla_cpu_parallel_codegen_split_count": 1,
}


def _flags(options: dict[str, bool | int]) -> str:
    named = [f"--{name}={value!s}".lower() for name, value in options.items()]
    return " ".join([*named, "--xla_cpu_experimental_ynn_fusion_type="])


# The same for a process.
QUICK_COMPILATION, NO_OPTIMIZATION = _flags(QUICK), _flags(QUICKEST)


@contextlib.contextmanager
def compiled_with(options: dict[str, bool | int]) -> Iterator[None]:
    """In the context, all that is compiled for CPUs is compiled with these options.

    XLA_FLAGS are read once in a process, and JAX has no setting of its own for all programs.
    """
    from jax._src import compiler

    original = compiler.get_compile_options

    def changed(*args, env_options_overrides=None, backend=None, **settings):
        if getattr(backend, "platform", "cpu") == "cpu":
            env_options_overrides = {**options, **(env_options_overrides or {})}
        overrides = {"env_options_overrides": env_options_overrides, "backend": backend}
        return original(*args, **overrides, **settings)

    with mock.patch.object(compiler, "get_compile_options", changed):
        yield


def quickest() -> contextlib.AbstractContextManager[None]:
    """`compiled_with(QUICKEST)`, also a decorator."""
    return compiled_with(QUICKEST)

"""How the tests have XLA compile."""

# Nearly all of the suite's time is compilation, so XLA spends little on optimization. At level 0
# it would spend a tenth less, but the programs would run three times as long.
QUICK_COMPILATION = (
    "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_experimental_ynn_fusion_type="
)

# For programs that run a few times: a training step compiles in a third of the time and runs half
# as fast, or a quarter where it adds up parts of a batch in a loop. Nothing is optimized, and no
# fusion has a compiler's pipeline of its own, which at level 0 takes most of the time.
QUICKEST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

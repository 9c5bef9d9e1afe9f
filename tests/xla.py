"""How the tests have XLA compile."""

# Nearly all of the suite's time is compilation, so XLA spends little on optimization. At level 0
# it would spend a tenth less, but the programs would run three times as long.
QUICK_COMPILATION = (
    "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_experimental_ynn_fusion_type="
)

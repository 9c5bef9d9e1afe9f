"""How the tests have XLA compile."""

# Nearly all of the suite's time is compilation, so XLA is told to spend none on optimization.
QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_experimental_ynn_fusion_type="
)

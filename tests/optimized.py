"""Compiler options of what users run: the session compiles without optimization (see `conftest.py`)."""

OPTIONS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}

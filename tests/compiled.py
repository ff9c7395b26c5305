"""XLA compiler settings of the tests."""

import importlib.metadata

# jaxlib 0.10 still has the older emitters, which compile small programs in a third of
# the time.
_HAS_OLDER_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
XLA_FLAGS = ["--xla_cpu_use_fusion_emitters=false"] if _HAS_OLDER_EMITTERS else []
# Compiler options for tests that need the code that users get.
AS_FOR_USERS = {"xla_cpu_use_fusion_emitters": True} if _HAS_OLDER_EMITTERS else {}

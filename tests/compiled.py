"""How XLA compiles the programs of the tests."""

import importlib.metadata

# jaxlib 0.10 has older emitters too, which take a third of the time for small programs.
_HAS_OLDER_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
XLA_FLAGS = ["--xla_cpu_use_fusion_emitters=false"] if _HAS_OLDER_EMITTERS else []
# Compiler options for what has to be as users have it.
AS_FOR_USERS = {"xla_cpu_use_fusion_emitters": True} if _HAS_OLDER_EMITTERS else {}

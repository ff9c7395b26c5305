"""BERT fine-tuning in Flax with any Optax optimizer; what `run_glue.py` is made of."""

import os

# transformers advises at import that its models need torch; they are not used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

"""Fine-tunes BERT in Flax with M-FAC or an Optax optimizer."""

import os

# At import transformers warns that its models need torch; they are not used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

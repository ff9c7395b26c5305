"""BERT in Flax, and its checkpoint files."""

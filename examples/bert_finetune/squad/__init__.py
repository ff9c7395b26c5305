"""Extractive question answering on SQuAD and your own files."""

"""Reads, tokenizes and batches examples."""

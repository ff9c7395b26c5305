"""Classification and regression: GLUE and your own files."""

"""Classification and regression: GLUE and files of one's own."""

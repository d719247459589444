"""The tutorial: chapters in Markdown, and the figures in them (`python -m tutorial.figures NAME`)."""

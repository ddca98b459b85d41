"""One module a figure: tidy data in, matplotlib figure out. Imported by the notebooks only."""

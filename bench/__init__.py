"""Floors and ours, measured in one run: the machine's noise cancels out in the ratios."""

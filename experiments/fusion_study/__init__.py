"""Comparisons of fusions: a grid of runs, what they tell, and how surely."""

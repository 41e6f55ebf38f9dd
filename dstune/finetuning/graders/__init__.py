"""Graders that need the server alone: comparisons of texts, and formulas over them."""

"""Attention operators: what they compute, what they cost, who sees whom."""

"""Policies: filters, scorers, pickers, and the closed table of names."""

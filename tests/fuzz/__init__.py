"""Fuzzers with a saved corpus: what parsers accept, an independent parser reads the same way."""

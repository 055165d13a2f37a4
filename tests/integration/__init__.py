"""Tests against real servers and real processes, and the helpers that start them."""

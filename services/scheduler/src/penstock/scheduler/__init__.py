"""Penstock: scheduler."""

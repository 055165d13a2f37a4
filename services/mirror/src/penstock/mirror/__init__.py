"""Penstock: mirror."""

"""Penstock: common."""

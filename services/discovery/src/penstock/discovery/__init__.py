"""Penstock: discovery."""

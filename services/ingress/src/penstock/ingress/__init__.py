"""Penstock: ingress."""

"""Scheduler replicas measured as processes: over the bus, and live between ingress and simulated engines."""

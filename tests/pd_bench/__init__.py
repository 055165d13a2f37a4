"""Disaggregation measured: pairs against neutral instances on virtual time; what the gateway adds, live."""

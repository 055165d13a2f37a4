"""Prefill and decode on different instances: what each protocol sends to which, and what flows between."""

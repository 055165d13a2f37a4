"""`python -m penstock.cli.bench`: the gateway, nginx and direct calls, measured side by side."""

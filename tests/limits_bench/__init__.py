"""What limits and API keys cost a request."""

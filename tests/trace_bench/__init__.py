"""What traces cost a request."""

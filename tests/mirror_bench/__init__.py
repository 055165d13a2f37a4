"""What clients notice of the mirror, measured."""

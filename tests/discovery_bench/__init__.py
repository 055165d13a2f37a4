"""What discovery costs and how fast it is: `make bench-discovery`."""

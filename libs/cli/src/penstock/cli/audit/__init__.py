"""`penstock audit`: whether the routing log is whole, and the log as a file."""

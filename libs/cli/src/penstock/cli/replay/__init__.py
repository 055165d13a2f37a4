"""`penstock replay`: a trace through the scheduler's own code, on simulated engines and virtual time."""

"""`penstock top`: what the fleet does at this moment, read from the bus."""

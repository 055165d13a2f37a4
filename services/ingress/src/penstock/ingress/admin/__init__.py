"""The admin API: what may be asked, who may ask, and what is done. Runs in the ingress's parent."""

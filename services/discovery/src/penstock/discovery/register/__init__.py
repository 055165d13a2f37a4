"""The sidecar of `penstock register`: keeps the engines beside it registered where discovery finds them."""

"""Images, compose file and manifests, held against the code that they start."""

"""A model of an LLM serving engine, on the real clock as an HTTP server or on a virtual one as a cluster."""

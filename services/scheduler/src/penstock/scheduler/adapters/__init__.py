"""One file per outside system; the only importers of I/O libraries."""

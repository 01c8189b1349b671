"""Sources, records and the input pipeline."""

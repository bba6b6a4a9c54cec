"""`make bench`: wall time and resident memory of an export, beside copying the base and beside PEFT's own merge."""

"""The batch job: base model and adapter become artifacts."""

"""The worst days of the service, made to happen many times over: `python -m tests.chaos`."""
